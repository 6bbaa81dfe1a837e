"""The PyTorch model under transformers: padding, neighbours, caches, generate, outputs, loss, checkpointing.

Runs with transformers 4.50 to 5 and needs no JAX.
"""

import pytest

from tests import torch_model as _  # first: skips without PyTorch
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, StaticCache

from tests.torch_model import CLOSE, padded, small_model, tokens

pytestmark = pytest.mark.torch

MAJOR, MINOR = (int(part) for part in transformers.__version__.split('.')[:2])


@pytest.fixture(autouse=True)
def no_gradients():
  with torch.no_grad():
    yield


# ---- padding and neighbours ----


@pytest.mark.parametrize('attention', ('sdpa', 'eager'))
@pytest.mark.parametrize('side', ('left', 'right'))
def test_padding_changes_nothing(side, attention):
  model = small_model(attn_implementation=attention)
  assert model.config._attn_implementation == attention
  rows, ids, mask = padded(side)
  logits = model(ids, attention_mask=mask).logits
  for i, row in enumerate(rows):
    torch.testing.assert_close(logits[i][mask[i] == 1], model(row[None]).logits[0], **CLOSE)
  assert torch.all(logits[mask == 0] == 0)
  ids[mask == 0] = 7  # whatever the padding is
  assert torch.equal(model(ids, attention_mask=mask).logits, logits)


@pytest.mark.parametrize('cached', (False, True))
def test_padding_in_the_middle(cached):
  """A turn behind a padded one. Only differences of positions matter, so padding at the ends would not show them."""
  model = small_model()
  row = tokens(1, 10)
  ids = torch.cat([row[:, :4], torch.zeros(1, 5, dtype=torch.long), row[:, 4:]], dim=1)
  mask = torch.ones_like(ids)
  mask[:, 4:9] = 0
  cache = DynamicCache() if cached else None
  logits = [model(ids[:, :end][:, begin:], attention_mask=mask[:, :end], past_key_values=cache).logits
            for begin, end in (((0, 9), (9, 12), (12, 15)) if cached else ((0, 15),))]
  torch.testing.assert_close(torch.cat(logits, dim=1)[mask == 1], model(row).logits[0], **CLOSE)


def test_batch_of_one_and_of_eight():
  model = small_model()
  rows, ids, mask = padded('left', lengths=(5, 16, 2, 9, 16, 1, 12, 7))
  logits = model(ids, attention_mask=mask).logits
  alone = torch.stack([model(row[None]).logits[0, -1] for row in rows])
  torch.testing.assert_close(logits[:, -1], alone, **CLOSE)


def test_other_modes_depend_on_neighbours():
  """Else the tests of this section could not fail."""
  ids = tokens(8, 16)
  free = small_model()(ids).logits
  for mode in ('t5x', 'colossalai'):
    full = small_model(capacity_mode=mode, capacity_factor_eval=0.5)(ids).logits
    assert (full - free).abs().max() > 0.1
    roomy = small_model(capacity_mode=mode, capacity_factor_eval=8.)(ids).logits
    torch.testing.assert_close(roomy, free, **CLOSE)


def test_mask_of_four_dimensions():
  model = small_model()
  ids = tokens(2, 9)
  causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
  want = model(ids).logits
  for mask in (causal, torch.zeros(1, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)):
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, **CLOSE)


def test_mask_of_the_wrong_length():
  with pytest.raises(ValueError, match='attention_mask has the shape'):
    small_model()(tokens(2, 9), attention_mask=torch.ones(2, 8))


# ---- caches and generate ----


def greedy_without_cache(model, row, steps):
  for _ in range(steps):
    row = torch.cat([row, model(row[None]).logits[0, -1].argmax()[None]])
  return row


def test_generate_is_argmax_of_full_forwards():
  model = small_model()
  rows, ids, mask = padded('left')
  want = [greedy_without_cache(model, row, 10)[-10:] for row in rows]
  got = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None)
  assert got[:, -10:].tolist() == torch.stack(want).tolist()
  again = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None,
                         use_cache=False)
  assert torch.equal(got, again)
  assert len({tuple(row.tolist()) for row in got}) == len(rows)


def test_generate_without_a_mask_does_not_take_the_first_token_for_padding():
  """transformers would guess that it is."""
  model = small_model()
  row = tokens(1, 6)[0]
  hidden = torch.ones(1, 6, dtype=torch.long)
  hidden[0, 0] = 0
  assert not torch.allclose(model(row[None], attention_mask=hidden).logits[0, -1], model(row[None]).logits[0, -1])
  out = model.generate(row[None], max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True,
                       return_dict_in_generate=True)
  assert torch.equal(out.sequences[0], greedy_without_cache(model, row, 5))
  torch.testing.assert_close(out.logits[0], model(row[None]).logits[:, -1], **CLOSE)


def test_generate_stops_at_the_end_of_a_sequence():
  model = small_model()
  row = tokens(1, 6)
  free = model.generate(row, max_new_tokens=8, do_sample=False, eos_token_id=None,
                        attention_mask=torch.ones_like(row))[0]
  stopped = model.generate(row, max_new_tokens=8, do_sample=False, eos_token_id=int(free[8]),
                           attention_mask=torch.ones_like(row))[0]
  end = free.tolist().index(int(free[8]), 6)
  assert stopped.tolist() == free[:end + 1].tolist()


def test_beam_search_and_sampling():
  model = small_model()
  rows, ids, mask = padded('left', lengths=(4, 7))
  options = dict(max_new_tokens=6, eos_token_id=None, do_sample=False, num_beams=3)
  got = model.generate(ids, attention_mask=mask, **options)
  for i, row in enumerate(rows):
    alone = model.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **options)[0]
    assert got[i, -6:].tolist() == alone[-6:].tolist()
  options = dict(max_new_tokens=6, eos_token_id=None, do_sample=True, attention_mask=mask)
  torch.manual_seed(3)
  first = model.generate(ids, **options)
  torch.manual_seed(3)
  assert torch.equal(first, model.generate(ids, **options))
  assert not torch.equal(first, model.generate(ids, **options))


def static_cache(model, batch, length):
  if MAJOR == 4 and MINOR < 56:
    return StaticCache(config=model.config, max_batch_size=batch, max_cache_len=length, device='cpu',
                       dtype=torch.float32)
  return StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize('masked', (False, True))
@pytest.mark.parametrize('kind', ('dynamic', 'static'))
def test_parts_with_a_cache(kind, masked):
  """A prompt, several tokens at once, single tokens; left padding."""
  model = small_model()
  _, ids, mask = padded('left', lengths=(12, 9, 12) if masked else (12, 12))
  want = model(ids, attention_mask=mask).logits
  cache = DynamicCache() if kind == 'dynamic' else static_cache(model, len(ids), 20)
  for begin, end in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12)):
    out = model(ids[:, begin:end], attention_mask=mask[:, :end] if masked else None, past_key_values=cache,
                cache_position=torch.arange(begin, end))
    torch.testing.assert_close(out.logits, want[:, begin:end], **CLOSE)
    assert out.past_key_values is cache


def test_generate_with_a_static_cache():
  model = small_model()
  rows, ids, mask = padded('left', lengths=(6, 3))
  want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
  got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                       past_key_values=static_cache(model, 2, 12))
  assert torch.equal(got, want)


@pytest.mark.parametrize('mode', ('t5x', 'colossalai'))
def test_other_modes_generate(mode):
  """Enough slots: nothing is dropped."""
  _, ids, mask = padded('left', lengths=(4, 3))
  options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
  got = small_model(capacity_mode=mode, min_capacity=8).generate(ids, **options)
  assert torch.equal(got, small_model().generate(ids, **options))


# ---- what comes out ----


def test_outputs():
  model = small_model()
  ids = tokens(2, 6)
  plain = model(ids)
  assert plain.router_logits is None and plain.attentions is None and plain.hidden_states is None
  assert plain.loss is None and plain.aux_loss is None and plain.past_key_values is not None
  out = model(ids, output_attentions=True, output_hidden_states=True, output_router_logits=True, use_cache=False)
  torch.testing.assert_close(out.logits, plain.logits, **CLOSE)
  assert [x.shape for x in out.router_logits] == [(2, 6, 8)] * 2
  assert [x.shape for x in out.attentions] == [(2, 4, 6, 6)] * 4
  assert [x.shape for x in out.hidden_states] == [(2, 6, 32)] * 5
  torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 6))
  assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
  torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
  assert out.past_key_values is None and 1 < out.aux_loss < 8 and out.router_z_loss > 0
  pair = model(ids, return_dict=False)
  assert isinstance(pair, tuple) and torch.equal(pair[0], plain.logits)
  embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
  assert torch.equal(embedded, plain.logits)
  with pytest.raises(ValueError, match='exactly one of input_ids and inputs_embeds'):
    model(ids, inputs_embeds=model.model.embed_tokens(ids))


def test_logits_to_keep():
  model = small_model()
  ids = tokens(2, 6)
  every = model(ids).logits
  torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
  torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, every[:, [1, 4]])
  with pytest.raises(ValueError, match='logits_to_keep = 2'):
    model(ids, labels=ids, logits_to_keep=2)


def test_loss():
  model = small_model(z_loss_factor=0., router_aux_loss_factor=0.5, router_z_loss_factor=0.25)
  ids = tokens(2, 6)
  labels = ids.clone()
  labels[0, :4] = -100
  out = model(ids, labels=labels)
  plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
  torch.testing.assert_close(out.loss, plain)
  model.train()
  out = model(ids, labels=labels)
  torch.testing.assert_close(out.loss, plain + 0.5 * out.aux_loss + 0.25 * out.router_z_loss)
  # 7 labels are scored; as a part of 28 they make up a quarter of the mean.
  torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=28).loss, out.loss / 4)
  assert model(ids, labels=torch.full_like(ids, -100)).loss.isfinite()


@pytest.mark.parametrize('reentrant', (False, True))
def test_gradient_checkpointing(reentrant):
  ids = tokens(3, 8)
  gradients = []
  with torch.enable_grad():
    for checkpointing in (False, True):
      model = small_model().train()
      if checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': reentrant})
        assert model.is_gradient_checkpointing
      model(ids, labels=ids, use_cache=True).loss.backward()
      gradients.append({name: x.grad for name, x in model.named_parameters()})
    with pytest.raises(ValueError, match='gradient checkpointing'):
      model(ids, past_key_values=DynamicCache())
  for name, gradient in gradients[0].items():
    assert gradient.abs().max() > 0, name
    torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_autocast_leaves_router_and_logits_alone():
  model = small_model()
  ids = tokens(2, 8)
  want = model(ids, output_router_logits=True)
  with torch.autocast('cpu', dtype=torch.bfloat16):
    got = model(ids, output_router_logits=True)
  assert got.logits.dtype == got.router_logits[0].dtype == torch.float32
  assert 1e-3 < (got.router_logits[0] - want.router_logits[0]).abs().mean() < 0.2  # what feeds it is in bfloat16


def test_residual_type_follows_the_configuration():
  ids = tokens(2, 5)
  for weights, residual, want in (('float32', 'bfloat16', 'float32'), ('bfloat16', 'bfloat16', 'bfloat16'),
                                  ('bfloat16', 'float32', 'float32'), ('float32', 'float32', 'float32')):
    model = small_model(residual_dtype=residual).to(getattr(torch, weights))
    out = model(ids, output_hidden_states=True)
    assert {x.dtype for x in out.hidden_states[:-1]} == {getattr(torch, want)}
    assert out.logits.dtype == torch.float32
