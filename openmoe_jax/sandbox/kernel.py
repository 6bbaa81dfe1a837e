"""What Linux offers to take rights away from a process, called through ctypes: namespaces, mounts, Landlock, seccomp.

Runs inside the sandbox's own processes: it imports the standard library only, and is loaded by its path (`inside`).
Every function raises OSError where the kernel, or the container around us, refuses.
"""

import ctypes
import os
import platform
import struct
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

_LIBC = ctypes.CDLL(None, use_errno=True)

# Of mounts, names, IPC, processes and the network.
_NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_NEW_USER = 0x10000000

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 24, 36, 38, 22

READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4  # MS_ flags of mount(2) and MOUNT_ATTR_ flags alike
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x40000, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

# Numbers that are the same on every architecture.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _CLONE3 = 442, 444, 445, 446, 435


def _check(result: int, what: str) -> int:
  if result < 0:
    number = ctypes.get_errno()
    raise OSError(number, f'{what}: {os.strerror(number)}')
  return result


def _syscall(what: str, number: int, *args) -> int:
  plain = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
  return _check(_LIBC.syscall(ctypes.c_long(number), *plain), what)


def _prctl(what: str, option: int, *args: int) -> None:
  _check(_LIBC.prctl(option, *[ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]]), what)


def die_with_parent() -> None:
  """This process is killed when the thread that started it ends."""
  _prctl('PR_SET_PDEATHSIG', _PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
  """Descendants whose parent ended become children of this process, so that it can end them."""
  _prctl('PR_SET_CHILD_SUBREAPER', _PR_SET_CHILD_SUBREAPER, 1)


def unshare() -> None:
  """New namespaces for mounts, names, IPC, network and future children, with an own user where only that is allowed."""
  uid, gid = os.geteuid(), os.getegid()
  if _LIBC.unshare(_NEW_NAMESPACES) == 0:
    return
  _check(_LIBC.unshare(_NEW_NAMESPACES | _NEW_USER), 'unshare')
  for name, text in (('setgroups', 'deny'), ('uid_map', f'{uid} {uid} 1'), ('gid_map', f'{gid} {gid} 1')):
    with open(f'/proc/self/{name}', 'w', encoding='ascii') as file:
      file.write(text)


def unshare_user() -> None:
  """A user namespace of its own, in which the kernel counts this process's threads and children apart from others."""
  _check(_LIBC.unshare(_NEW_USER), 'unshare')


def keep_mounts_private() -> None:
  """Mounts that this process makes from now on are seen by nobody else."""
  _mount(None, '/', None, _RECURSIVE | _PRIVATE)


def _mount(source: Optional[str], target: str, kind: Optional[str], flags: int, data: Optional[str] = None) -> None:
  encoded = [value if value is None else os.fsencode(value) for value in (source, target, kind, data)]
  _check(_LIBC.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f'mount {target}')


def mount_memory(target: str, size: int, mode: int) -> None:
  """An empty folder of at most `size` bytes, kept in memory."""
  _mount('tmpfs', target, 'tmpfs', NO_SETUID | NO_DEVICES, f'size={size},nr_inodes=4096,mode={mode:o}')


def bind(source: str, target: str) -> None:
  """Shows a file or folder at another place, too."""
  _mount(source, target, None, _BIND | _RECURSIVE)


def set_mount_flags(target: str, flags: int, recursive: bool) -> None:
  attributes = struct.pack('=QQQQ', flags, 0, 0, 0)
  _syscall(f'mount_setattr {target}', _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE if recursive else 0,
           attributes, len(attributes))


def enter_root(folder: str) -> None:
  """Makes a mounted folder the root of this process; what was there before is out of reach."""
  os.chdir(folder)
  _check(_LIBC.pivot_root(b'.', b'.'), 'pivot_root')
  _check(_LIBC.umount2(b'.', _DETACH), 'umount')
  os.chdir('/')


def drop_capabilities() -> None:
  """Gives up the rights of root that this process has, also those inside a user namespace, for good."""
  for capability in range(64):
    if _LIBC.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
      break  # past the last one, or not ours to drop
  header, none = struct.pack('=Ii', 0x20080522, 0), bytes(24)
  _check(_LIBC.capset(header, none), 'capset')
  _prctl('PR_SET_NO_NEW_PRIVS', _PR_SET_NO_NEW_PRIVS, 1)


# --- Landlock: an allow-list of files

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
  """Nothing may be opened but what lies below `readable` (to read) and `writable` (for everything); for good.

  Where the kernel knows how (ABI 4, 6), TCP and signals to processes outside are refused, too. Rights that Landlock
  does not know (chmod, chown, utime) are left to `seccomp`.
  """
  abi = _syscall('Landlock', _LANDLOCK_CREATE, None, 0, 1)
  rights = (1 << 13) - 1  # ABI 1
  for version, right in ((2, 1 << 13), (3, _TRUNCATE), (5, _IOCTL)):
    rights |= right if abi >= version else 0
  attributes = struct.pack('=Q', rights)
  if abi >= 4:
    attributes += struct.pack('=Q', 3)  # bind, connect
  if abi >= 6:
    attributes += struct.pack('=Q', 3)  # abstract Unix sockets, signals
  ruleset = _syscall('landlock_create_ruleset', _LANDLOCK_CREATE, attributes, len(attributes), 0)
  try:
    for paths, allowed in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, rights)):
      for path in paths:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
          these = allowed & rights & (-1 if os.path.isdir(path) else _OF_FILES)
          _syscall(f'landlock_add_rule {path}', _LANDLOCK_ADD, ruleset, 1, struct.pack('=Qi', these, place), 0)
        finally:
          os.close(place)
    _prctl('PR_SET_NO_NEW_PRIVS', _PR_SET_NO_NEW_PRIVS, 1)
    _syscall('landlock_restrict_self', _LANDLOCK_RESTRICT, ruleset, 0)
  finally:
    os.close(ruleset)


# --- seccomp: a deny-list of system calls

_ARCHITECTURES = {'x86_64': 0xC000003E, 'aarch64': 0xC00000B7}
# What a program that computes never needs: (x86_64, aarch64); None where the architecture has no such call.
_DENIED: Dict[str, Tuple[Optional[int], Optional[int]]] = {
    # sockets, and ways round them
    'socket': (41, 198), 'io_uring_setup': (425, 425),
    # programs and processes (clone and clone3 are looked at below)
    'fork': (57, None), 'vfork': (58, None), 'execve': (59, 221), 'execveat': (322, 281),
    # other processes
    'ptrace': (101, 117), 'process_vm_readv': (310, 270), 'process_vm_writev': (311, 271), 'tkill': (200, 130),
    'rt_sigqueueinfo': (129, 138), 'rt_tgsigqueueinfo': (297, 240), 'pidfd_open': (434, 434),
    'pidfd_send_signal': (424, 424), 'pidfd_getfd': (438, 438), 'setpriority': (141, 140), 'ioprio_set': (251, 30),
    'sched_setaffinity': (203, 122), 'sched_setscheduler': (144, 119), 'sched_setparam': (142, 118),
    'sched_setattr': (314, 274), 'setpgid': (109, 154), 'setsid': (112, 157),
    # memory that no limit counts, and what outlives a process
    'memfd_create': (319, 279), 'memfd_secret': (447, 447), 'shmget': (29, 194), 'msgget': (68, 186),
    'semget': (64, 190), 'mq_open': (240, 180), 'add_key': (248, 217), 'request_key': (249, 218), 'keyctl': (250, 219),
    # properties of files, which Landlock leaves alone
    'chmod': (90, None), 'fchmod': (91, 52), 'fchmodat': (268, 53), 'fchmodat2': (452, 452), 'chown': (92, None),
    'fchown': (93, 55), 'lchown': (94, None), 'fchownat': (260, 54), 'truncate': (76, 45), 'utime': (132, None),
    'utimes': (235, None), 'futimesat': (261, None), 'utimensat': (280, 88), 'setxattr': (188, 5),
    'lsetxattr': (189, 6), 'fsetxattr': (190, 7), 'removexattr': (197, 14), 'lremovexattr': (198, 15),
    'fremovexattr': (199, 16),
    'setxattrat': (463, 463), 'removexattrat': (466, 466), 'file_setattr': (469, 469), 'mknod': (133, None),
    'mknodat': (259, 33), 'open_by_handle_at': (304, 265),
    # the machine
    'mount': (165, 40), 'umount2': (166, 39), 'pivot_root': (155, 41), 'chroot': (161, 51), 'unshare': (272, 97),
    'setns': (308, 268), 'open_tree': (428, 428), 'move_mount': (429, 429), 'fsopen': (430, 430), 'fsmount': (432, 432),
    'mount_setattr': (442, 442), 'bpf': (321, 280), 'perf_event_open': (298, 241), 'userfaultfd': (323, 282),
    'init_module': (175, 105), 'finit_module': (313, 273), 'delete_module': (176, 106), 'kexec_load': (246, 104),
    'kexec_file_load': (320, 294), 'reboot': (169, 142), 'swapon': (167, 224), 'swapoff': (168, 225), 'acct': (163, 89),
    'sethostname': (170, 161), 'setdomainname': (171, 162), 'settimeofday': (164, 170), 'clock_settime': (227, 112),
    'adjtimex': (159, 171), 'clock_adjtime': (305, 266), 'syslog': (103, 116), 'quotactl': (179, 60),
}
_CLONE, _KILL, _TGKILL, _PRLIMIT = (56, 220), (62, 129), (234, 131), (302, 261)
_CLONE_THREAD = 0x00010000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of classic BPF
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_EPERM, _ENOSYS = 1, 38


class _Filter(ctypes.Structure):
  _fields_ = [('length', ctypes.c_ushort), ('instructions', ctypes.c_void_p)]


def _instructions(machine: str, pid: int) -> List[Tuple[int, int, int, int]]:
  """(operation, jump if true, jump if false, constant) of the filter; a jump counts the instructions left out."""
  column = list(_ARCHITECTURES).index(machine)
  refuse = (_RETURN, 0, 0, _ERROR | _EPERM)
  code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL_PROCESS),
          (_LOAD, 0, 0, _NUMBER)]
  if machine == 'x86_64':  # the x32 calls, which are the same ones under other numbers
    code += [(_AT_LEAST, 0, 1, 0x40000000), refuse]
  for numbers in _DENIED.values():
    if numbers[column] is not None:
      code += [(_EQUAL, 0, 1, numbers[column]), refuse]
  # Without the structure behind clone3, which a filter cannot read, libraries fall back to clone.
  code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | _ENOSYS)]
  code += _if_first_argument(_CLONE[column], [(_ANY_BIT, 0, 1, _CLONE_THREAD)])
  for numbers in (_KILL, _TGKILL):  # a process may signal itself, as abort() does
    code += _if_first_argument(numbers[column], [(_EQUAL, 0, 1, pid)])
  code += _if_first_argument(_PRLIMIT[column], [(_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, pid)])
  return code + [(_RETURN, 0, 0, _ALLOW)]


def _if_first_argument(number: int, test: Sequence[Tuple[int, int, int, int]]) -> List[Tuple[int, int, int, int]]:
  """Allows a call where `test` does not jump over the next instruction, and refuses it where it does."""
  then = [(_LOAD, 0, 0, _FIRST_ARGUMENT), *test, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | _EPERM)]
  return [(_EQUAL, 0, len(then), number), *then]


def seccomp() -> None:
  """Refuses sockets, new processes and programs, and what else a program that computes never needs; for good.

  Threads stay possible.
  """
  machine = platform.machine()
  if machine not in _ARCHITECTURES:
    raise OSError(_ENOSYS, f'seccomp: no list of system calls for {machine}')
  code = b''.join(struct.pack('=HBBI', *instruction) for instruction in _instructions(machine, os.getpid()))
  buffer = ctypes.create_string_buffer(code, len(code))
  program = _Filter(len(code) // 8, ctypes.addressof(buffer))
  _prctl('PR_SET_NO_NEW_PRIVS', _PR_SET_NO_NEW_PRIVS, 1)
  _prctl('PR_SET_SECCOMP', _PR_SET_SECCOMP, 2, ctypes.addressof(program))
