"""OpenMoE's forward pass in numpy float64, written from SPEC 1 and 2 alone: nothing of the library is used.

`forward` takes parameters under their T5X names, a feature dictionary and settings in a `ModelConfig`-like object.
"""

import math

import numpy as np

from tests import routing_reference


def silu(z):
  return z / (1 + np.exp(-z))


def rms_norm(x, scale, epsilon=1e-6):
  return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale


def logit_mask(tokens):
  """SPEC 1.2."""
  mask = np.zeros(tokens.shape, bool)
  length = tokens.shape[1]
  for b in range(tokens.shape[0]):
    for t in range(length):
      mask[b, t] = tokens[b, t] > 0 or t == 0 or (t + 1 < length and tokens[b, t + 1] > 0)
  return mask


def attention_mask(batch, bidirectional):
  """SPEC 1.7: bool [B, L, L]."""
  target = batch['decoder_target_tokens'] > 0
  length = target.shape[1]
  see = np.tril(np.ones((length, length), bool))[None]
  if bidirectional:
    c = batch['decoder_causal_attention'] > 0
    see = see | (c[:, :, None] & c[:, None, :])
  see = see & target[:, :, None] & target[:, None, :]
  if 'decoder_segment_ids' in batch:
    ids = batch['decoder_segment_ids']
    see = see & (ids[:, :, None] == ids[:, None, :])
  return see


def rotate(x):
  """SPEC 1.8: x [L, K] by its row number."""
  length, width = x.shape
  angle = np.arange(length)[:, None] * 10000. ** (-2 * np.arange(width // 2) / width)[None]
  angle = np.concatenate([angle, angle], axis=1)
  half = np.concatenate([-x[:, width // 2:], x[:, :width // 2]], axis=1)
  return x * np.cos(angle) + half * np.sin(angle)


def attention(x, weights, see, heads, head_dim):
  """SPEC 1.6."""
  out = np.zeros((*x.shape[:2], heads * head_dim))
  for b in range(x.shape[0]):
    q, k, v = (x[b] @ weights[f'{name}/kernel'] for name in ('query', 'key', 'value'))
    for h in range(heads):
      at = slice(h * head_dim, (h + 1) * head_dim)
      scores = rotate(q[:, at]) @ rotate(k[:, at]).T
      scores = np.where(see[b], scores, -np.inf)
      scores[~see[b].any(axis=1)] = 0.  # float32 + -1e10 leaves nothing of a score: equal weights
      out[b, :, at] = routing_reference.softmax(scores) @ v[:, at]
  return out @ weights['out/kernel']


def feed_forward(x, wi_0, wi_1, wo, plain):
  """SPEC 1.9; `plain` is the usual SwiGLU."""
  a, b = x @ wi_0, x @ wi_1
  if plain:
    return (silu(a) * b) @ wo
  width = a.shape[-1] // 2
  return (a[..., :width] * silu(a[..., width:]) * b) @ wo


def moe(x, weights, config, train, plain):
  """SPEC 2: x [B, L, D] -> the same, and the routing."""
  batch, length, width = x.shape
  multiple = config.num_expert_replicas * config.num_experts
  rows, columns = routing_reference.padded_shape(batch, length, multiple)
  padded = np.zeros((rows, columns, width))
  padded[:batch, :length] = x
  groups = routing_reference.number_of_groups(rows * columns, config.group_size, multiple)
  tokens = padded.reshape(groups, -1, width)
  factor = config.train_capacity_factor if train else config.eval_capacity_factor
  capacity = routing_reference.capacity(factor, tokens.shape[1], config.num_experts, config.min_expert_capacity)
  if config.capacity_mode == 'none':
    capacity = tokens.shape[1]
  is_token = (tokens != 0).any(axis=-1) if config.ignore_padding_tokens else None
  routed = routing_reference.route(tokens @ weights['router/router_weights/w/kernel'], config.num_selected_experts,
                                   capacity, is_token, config.batch_prioritized)
  out = np.zeros(tokens.shape)
  for g, t, s in zip(*np.nonzero(routed.kept)):
    e = routed.expert[g, t, s]
    expert = [weights[f'expert/{name}/kernel'][e] for name in ('wi_0', 'wi_1', 'wo')]
    out[g, t] += routed.gate[g, t, s] * feed_forward(tokens[g, t], *expert, plain)
  return out.reshape(rows, columns, width)[:batch, :length], routed


def forward(config, params, batch, train):
  """float64 logits [B, L, V] and the routing of every sparse layer."""
  params = {name: np.asarray(array, np.float64) for name, array in params.items()}
  plain = tuple(config.mlp_activations) == ('silu', 'linear')
  tokens = batch['decoder_input_tokens']
  mask = logit_mask(tokens)[..., None]
  see = attention_mask(batch, config.inputs_bidirectional_attention)
  table = params['token_embedder/embedding']
  inside = (tokens >= 0) & (tokens < len(table))
  x = np.where(inside[..., None], table[np.where(inside, tokens, 0)], 0.)
  routing = []
  for i in range(config.num_layers):
    prefix = f'decoder/layers_{i}/'
    layer = {name[len(prefix):]: array for name, array in params.items() if name.startswith(prefix)}
    part = lambda start: {name[len(start):]: array for name, array in layer.items() if name.startswith(start)}
    normed = lambda name: mask * rms_norm(x, layer[f'{name}/scale'])
    mlp = lambda y, name: feed_forward(y, *(layer[f'{name}/{w}/kernel'] for w in ('wi_0', 'wi_1', 'wo')), plain)
    sparse = config.num_experts and i % config.moe_interval == config.moe_interval - 1
    parallel = sparse and config.parallel_attention
    y = normed('pre_self_attention_layer_norm')
    x = x + attention(y, part('self_attention/'), see, config.num_heads, config.head_dim)
    if not parallel:
      y = normed('pre_mlp_layer_norm')
    if not sparse:
      x = x + mlp(y, 'mlp')
      continue
    out, routed = moe(y, part('mlp/'), config, train, plain)
    routing.append(routed)
    x = x + out
    if config.num_shared_experts:
      x = x + mlp(y, 'mlp/shared_experts')
    if config.parallel_moe or (parallel and config.extra_mlp):
      x = x + mlp(y, 'extra_mlp')
    elif config.extra_mlp:
      x = x + mlp(normed('pre_extra_mlp_layer_norm'), 'extra_mlp')
  return (mask * rms_norm(x, params['decoder/decoder_norm/scale'])) @ params['decoder/logits_dense/kernel'], routing


def shapes(config):
  """Parameter names and shapes of SPEC 6."""
  width, hidden, joined = config.emb_dim, config.mlp_dim, config.num_heads * config.head_dim
  first = hidden if tuple(config.mlp_activations) == ('silu', 'linear') else 2 * hidden
  network = {'wi_0/kernel': (width, first), 'wi_1/kernel': (width, hidden), 'wo/kernel': (hidden, width)}
  found = {'token_embedder/embedding': (config.vocab_size, width), 'decoder/decoder_norm/scale': (width,),
           'decoder/logits_dense/kernel': (width, config.vocab_size)}
  for i in range(config.num_layers):
    prefix = f'decoder/layers_{i}/'
    sparse = config.num_experts and i % config.moe_interval == config.moe_interval - 1
    parallel = sparse and config.parallel_attention
    for norm in ('pre_self_attention_layer_norm', 'pre_mlp_layer_norm')[:1 if parallel else 2]:
      found[f'{prefix}{norm}/scale'] = (width,)
    for name in ('query', 'key', 'value'):
      found[f'{prefix}self_attention/{name}/kernel'] = (width, joined)
    found[f'{prefix}self_attention/out/kernel'] = (joined, width)
    if sparse:
      found[f'{prefix}mlp/router/router_weights/w/kernel'] = (width, config.num_experts)
      for name, shape in network.items():
        found[f'{prefix}mlp/expert/{name}'] = (config.num_experts, *shape)
      if config.num_shared_experts:
        n = config.num_shared_experts
        found.update({f'{prefix}mlp/shared_experts/{name}': (n * a, b) if name == 'wo/kernel' else (a, n * b)
                      for name, (a, b) in network.items()})
      if config.extra_mlp:
        found.update({f'{prefix}extra_mlp/{name}': shape for name, shape in network.items()})
        if not config.parallel_moe and not parallel:
          found[f'{prefix}pre_extra_mlp_layer_norm/scale'] = (width,)
    else:
      found.update({f'{prefix}mlp/{name}': shape for name, shape in network.items()})
  return found


def random_params(config, seed):
  """Parameters that leave no path idle: every sub-layer adds about as much as there is, and experts differ."""
  rng = np.random.RandomState(seed)
  params = {}
  for name, shape in sorted(shapes(config).items()):
    if name.endswith('scale'):
      array = 1 + 0.3 * rng.randn(*shape)
    elif name.endswith('embedding'):
      array = rng.randn(*shape)
    else:
      array = rng.randn(*shape) / math.sqrt(shape[-2])
      if 'query' in name:
        array /= math.sqrt(config.head_dim)
    params[name] = array.astype(np.float32)
  return params
