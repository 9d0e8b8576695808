"""The mixtures against the plain computation with all N x K x V probabilities."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import monosoftmax as ms
from monosoftmax import head_products, mixtures
from monosoftmax.mixtures import MixtureOfContexts, MixtureOfSoftmaxes

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")

N, IN, D, V, K = 12, 7, 5, 23, 3
both = pytest.mark.parametrize("kind", [MixtureOfSoftmaxes, MixtureOfContexts])


def layer(kind=MixtureOfSoftmaxes, dtype=torch.float64, scale=3.0, **options):
    """A layer with large enough weights for the components to disagree."""
    torch.manual_seed(3)
    module = kind(IN, V, K, D, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(N, IN, generator=generator, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=generator)
    target[4] = -100
    return input, target


def plain_probabilities(module, input: Tensor) -> Tensor:
    """p of all classes, as the formulas say, from tensors of N x K x V."""
    latent = torch.tanh(F.linear(input, module.latent.weight, module.latent.bias)).unflatten(-1, (K, -1))
    prior = torch.softmax(F.linear(input, module.prior.weight), -1).unsqueeze(-1)
    if isinstance(module, MixtureOfContexts):
        return torch.softmax(F.linear((prior * latent).sum(-2), module.decoder.weight, module.decoder.bias), -1)
    logits = F.linear(latent, module.decoder.weight, module.decoder.bias)
    return (prior * torch.softmax(logits, -1)).sum(-2)


# --- the loss and its gradients ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_loss_and_gradients_equal_the_plain_computation(data, kind, bias, backend):
    input, target = data
    check_loss_and_gradients(input, target, layer(kind, bias=bias, backend=backend))


@pytest.mark.parametrize("chunk_rows", [1, 5, 6, 11, 12, 13, 1000])
def test_every_chunk_size_gives_the_same(data, chunk_rows):
    input, target = data
    check_loss_and_gradients(input, target, layer(chunk_rows=chunk_rows))


def check_loss_and_gradients(input, target, module):
    plain = copy.deepcopy(module)
    x, x_plain = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, loss = module(x, target)
    loss.backward()

    valid = target != -100
    log_p = plain_probabilities(plain, x_plain).log()
    expected = log_p[valid].gather(1, target[valid, None]).squeeze(1)
    (-expected.mean()).backward()
    torch.testing.assert_close(output[valid], expected)
    assert (output[~valid] == 0).all()
    torch.testing.assert_close(loss, -expected.mean())
    torch.testing.assert_close(x.grad, x_plain.grad)
    assert (x.grad[~valid] == 0).all()
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck(data):
    input, target = data
    module = layer(chunk_rows=5)
    names, raw = zip(*module.named_parameters(), strict=True)

    def function(x, *raw):
        output, loss = torch.func.functional_call(module, dict(zip(names, raw, strict=True)), (x, target))
        return output, loss

    assert torch.autograd.gradcheck(function, (input.requires_grad_(), *raw), fast_mode=True)


@both
def test_output_carries_gradients_of_its_own(data, kind):
    input, target = data
    module, plain = layer(kind), layer(kind)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    (module(input, target).output * upstream).sum().backward()
    valid = target != -100
    log_p = plain_probabilities(plain, input).log()[valid].gather(1, target[valid, None]).squeeze(1)
    (log_p * upstream[valid]).sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@both
def test_log_prob_and_predict(data, kind):
    input, _ = data
    module = layer(kind)
    p = plain_probabilities(module, input)
    torch.testing.assert_close(module.log_prob(input), p.log())
    assert torch.equal(module.predict(input), p.argmax(-1))
    module.zero_grad()
    module.log_prob(input)[:, 3].sum().backward()
    ours = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    plain_probabilities(module, input).log()[:, 3].sum().backward()
    for gradient, parameter in zip(ours, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_predict_is_the_mode_of_the_mixture_not_of_a_component():
    module = MixtureOfSoftmaxes(2, 3, 2, 2, bias=False)
    with torch.no_grad():
        # Two experts with opposite vectors: one prefers class 0, then 2; the other class 1, then 2.
        module.prior.weight.zero_()
        module.latent.weight.zero_()
        module.latent.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 1.0]) * 20)
        module.decoder.weight.copy_(torch.log(torch.tensor([[0.55, 0.01], [0.01, 0.55], [0.44, 0.44]])))
    input = torch.zeros(1, 2)
    assert module.log_prob(input).exp()[0].tolist() == pytest.approx([0.28, 0.28, 0.44], abs=1e-4)
    assert module.predict(input).item() == 2


@both
def test_one_expert_is_an_ordinary_softmax_of_the_latent(data, kind):
    input, target = data
    module = kind(IN, V, 1, D, dtype=torch.float64)
    expected = F.cross_entropy(module.decoder.logits(torch.tanh(module.latent(input))), target)
    torch.testing.assert_close(module(input, target).loss, expected)


def test_mixture_of_contexts_has_logits_and_the_options_of_one_softmax(data):
    input, target = data
    module = layer(MixtureOfContexts, label_smoothing=0.1, z_loss=1e-3)
    z = module.logits(input)
    torch.testing.assert_close(torch.softmax(z, -1), plain_probabilities(module, input))
    output, loss = module(input, target)
    valid = target != -100
    expected = F.cross_entropy(z, target, label_smoothing=0.1) + 1e-3 * z[valid].logsumexp(1).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(output[valid], F.log_softmax(z, -1)[valid].gather(1, target[valid, None]).squeeze(1))


def test_rank_of_the_log_probabilities():
    torch.manual_seed(0)
    input = torch.randn(60, 8, dtype=torch.float64)
    for kind, bias, rank in (
        (MixtureOfContexts, True, 5),
        (MixtureOfContexts, False, 4),
        (MixtureOfSoftmaxes, True, 50),
    ):
        module = kind(8, 50, 4, 3, bias, dtype=torch.float64)
        with torch.no_grad():
            module.decoder.weight.mul_(10)
        values = torch.linalg.svdvals(module.log_prob(input).detach())
        assert int((values > 1e-9 * values[0]).sum()) == rank


# --- the published form -----------------------------------------------------------------------------------------------


def test_published_form_is_log_of_p_plus_1e_8(data):
    input, target = data
    module = layer(published=True)
    valid = target != -100
    log_p = (plain_probabilities(module, input) + 1e-8).log()
    torch.testing.assert_close(module.log_prob(input), log_p)
    assert torch.equal(module.predict(input), log_p.argmax(-1))
    output, loss = module(input, target)
    torch.testing.assert_close(output[valid], log_p[valid].gather(1, target[valid, None]).squeeze(1))
    assert output[4] == 0
    torch.testing.assert_close(loss, -output[valid].mean())


def test_published_form_has_the_gradients_of_the_fair_one_where_p_is_large(data):
    input, target = data
    fair, published = layer(scale=1.0), layer(scale=1.0, published=True)
    for module in (fair, published):
        module(input, target).loss.backward()
    for ours, theirs in zip(fair.parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_only_the_published_form_caps_the_loss():
    fair, published = (MixtureOfSoftmaxes(2, 3, 2, published=flag) for flag in (False, True))
    for module in (fair, published):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            module.decoder.bias.copy_(torch.tensor([0.0, 500.0, -500.0]))
    input, target = torch.ones(1, 2), torch.tensor([2])
    assert fair(input, target).loss.item() == pytest.approx(1000.0)
    assert published(input, target).loss.item() == pytest.approx(-math.log(1e-8))


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returned, and of all that were alive at once, at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def forget(_):
            self.known.pop(key)
            self.live -= size

        self.known[key] = weakref.ref(storage, forget)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)


def memory_of_a_step(rows: int, backend="auto", **options) -> Memory:
    torch.manual_seed(0)
    module = MixtureOfSoftmaxes(4, 2000, 5, backend=backend, **options)
    input, target = torch.randn(rows, 4), torch.randint(2000, (rows,))
    with Memory() as memory:
        module(input, target).loss.backward()
    return memory


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_logits_exist_for_one_chunk_only(backend):
    chunk = 4 * 5 * 2000 * 4
    memory = memory_of_a_step(100, backend, chunk_rows=4)
    # 25 chunks: were they kept, the peak would be above 25. The reference holds a chunk's logits several times.
    assert memory.largest <= chunk
    assert memory.peak < (8 if backend == "reference" else 5) * chunk
    twice = memory_of_a_step(200, backend, chunk_rows=4)
    assert twice.largest == memory.largest
    assert twice.peak - memory.peak < chunk / 2

    published = memory_of_a_step(100, published=True)
    assert published.largest == 25 * chunk
    assert published.peak > 50 * chunk


def test_the_default_chunk_follows_the_budget(monkeypatch):
    assert mixtures.LOGITS_BUDGET == 64 * 2**20
    monkeypatch.setattr(mixtures, "LOGITS_BUDGET", 10 * 5 * 2000 * 4 + 1)
    assert memory_of_a_step(100, "reference").largest == 10 * 5 * 2000 * 4
    monkeypatch.setattr(mixtures, "LOGITS_BUDGET", 1)
    # One row at least; the weight of the decoder is larger than its logits are.
    assert memory_of_a_step(100, "reference").largest == 5 * 2000 * 4


def test_the_fused_backend_chunks_by_itself(monkeypatch):
    monkeypatch.setattr(mixtures, "LOGITS_BUDGET", 0)  # of no concern to it
    monkeypatch.setattr(head_products, "chunk_rows", lambda *_: 16)
    torch.manual_seed(0)
    data = torch.randn(100, 4), torch.randint(2000, (100,))
    module = MixtureOfSoftmaxes(4, 2000, 5, backend="cpu")
    wanted = MixtureOfSoftmaxes(4, 2000, 5, backend="cpu", chunk_rows=7)
    wanted.load_state_dict(module.state_dict())
    for layer_ in (module, wanted):
        layer_(*data).loss.backward()
    for got, expected in zip(module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_without_gradients_nothing_is_kept(data):
    torch.manual_seed(0)
    module = MixtureOfSoftmaxes(4, 2000, 5, chunk_rows=4)
    with torch.no_grad(), Memory() as memory:
        module(torch.randn(100, 4), torch.randint(2000, (100,)))
    assert memory.peak < 2 * 4 * 5 * 2000 * 4


def test_log_prob_holds_one_component_at_a_time():
    module = MixtureOfSoftmaxes(4, 2000, 50)
    with torch.no_grad(), Memory() as memory:
        module.log_prob(torch.randn(100, 4))
    assert memory.largest == 100 * 2000 * 4
    assert memory.peak < 8 * 100 * 2000 * 4


# --- numerics ---------------------------------------------------------------------------------------------------------


def test_extreme_logits_stay_finite_and_exact(data):
    input, target = data[0].float(), data[1]
    module = layer(dtype=torch.float32, chunk_rows=5)
    with torch.no_grad():
        module.decoder.weight.mul_(1e4)
        module.prior.weight.mul_(1e3)
    output, loss = module(input, target)
    loss.backward()
    assert torch.isfinite(output).all()
    # Probabilities underflow: exp of these is 0 in float32.
    assert output.min() < -1000
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    exact = copy.deepcopy(module).double()
    torch.testing.assert_close(output.double(), exact(input.double(), target).output, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(module.log_prob(input).double(), exact.log_prob(input.double()), rtol=1e-5, atol=1e-3)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(data, kind, dtype):
    input, target = data[0].float(), data[1]
    options = {"chunk_rows": 5} if kind is MixtureOfSoftmaxes else {}
    module = layer(kind, torch.float32, scale=2.0, **options)
    exact = copy.deepcopy(module)
    exact(input, target).loss.backward()
    with torch.autocast("cpu", dtype):
        output, loss = module(input, target)
        log_p = module.log_prob(input)
    loss.backward()
    assert output.dtype == loss.dtype == log_p.dtype == torch.float32
    # Rounding the operands to dtype: logits of size 5 with relative errors of a few eps.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output, exact(input, target).output, rtol=0, atol=10 * eps)
    torch.testing.assert_close(log_p, exact.log_prob(input), rtol=0, atol=20 * eps)
    for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 10 * eps * theirs.grad.norm()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module(data, kind, dtype):
    input, target = data[0].to(dtype), data[1]
    module = layer(kind, torch.float32).to(dtype)
    exact = copy.deepcopy(module).double()
    output, loss = module(input, target)
    loss.backward()
    assert output.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(
        output.double(), exact(input.double(), target).output, rtol=0, atol=100 * torch.finfo(dtype).eps
    )
    assert all(p.grad.dtype == dtype and torch.isfinite(p.grad).all() for p in module.parameters())


def test_gradient_of_the_decoder_is_summed_in_float32():
    torch.manual_seed(0)
    # 512 chunks of one row with the same gradient of the bias: a sum of 0.75s in bfloat16 stops growing at 256.
    module = MixtureOfSoftmaxes(2, 4, 2, chunk_rows=1, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module(torch.zeros(512, 2, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.long)).output.sum().backward()
    assert module.decoder.bias.grad.tolist() == [384.0, -128.0, -128.0, -128.0]


def test_a_class_masked_by_its_bias_keeps_gradients_finite(data):
    input, target = data
    module = layer(chunk_rows=5)
    with torch.no_grad():
        module.decoder.bias[3] = -torch.inf
    target = torch.where(target == 3, 4, target)
    module(input, target).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    module.zero_grad()
    log_p = module.log_prob(input)
    assert (log_p[:, 3] == -torch.inf).all()
    log_p[:, :3].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


# --- as layers --------------------------------------------------------------------------------------------------------


@both
def test_any_leading_shape_and_empty_batches(data, kind):
    input, target = data
    module = layer(kind)
    output, loss = module(input, target)
    shaped = module(input.reshape(3, 4, IN), target.reshape(3, 4))
    torch.testing.assert_close(shaped.output, output.reshape(3, 4))
    torch.testing.assert_close(shaped.loss, loss)
    assert module.log_prob(input.reshape(3, 4, IN)).shape == (3, 4, V)
    assert module.predict(input.reshape(3, 4, IN)).shape == (3, 4)
    torch.testing.assert_close(module(input[0], target[0]).output, output[0])
    empty = module(input[:0], target[:0])
    assert empty.output.shape == (0,)
    assert empty.loss.isnan()
    assert module(input, torch.full_like(target, -100)).loss.isnan()


@both
@pytest.mark.parametrize("published", [False, True])
def test_ignore_index(data, kind, published):
    if published and kind is MixtureOfContexts:
        pytest.skip("has no published form of its own")
    input, target = data
    options = {"published": True} if published else {}
    target = target.clone()
    target[4] = 9
    module, default = layer(kind, ignore_index=9, **options), layer(kind, **options)
    valid = target != 9
    output, loss = module(input, target)
    torch.testing.assert_close(loss, default(input[valid], target[valid]).loss)
    assert (output[~valid] == 0).all()


@both
@pytest.mark.parametrize("published", [False, True])
def test_dropout_is_of_the_latent_and_in_training_only(data, kind, published):
    if published and kind is MixtureOfContexts:
        pytest.skip("has no published form of its own")
    input, target = data
    options = {"published": True} if published else {}
    module, without = layer(kind, dropout=0.5, **options), layer(kind, **options)
    torch.testing.assert_close(module.eval()(input, target).loss, without(input, target).loss)
    module.train()
    torch.manual_seed(0)
    latent = module._experts(input)[0]
    full = without._experts(input)[0]
    dropped = latent == 0
    assert 0.35 < dropped.double().mean() < 0.65
    torch.testing.assert_close(latent[~dropped], 2 * full[~dropped])
    torch.manual_seed(0)
    first = module(input, target).loss
    assert not torch.allclose(first, without(input, target).loss)
    torch.manual_seed(0)
    torch.testing.assert_close(module(input, target).loss, first)


def test_dropout_is_the_same_in_the_second_computation_of_a_chunk(data):
    input, target = data
    gradients = []
    for chunk_rows in (1, 100):
        module = layer(dropout=0.5, chunk_rows=chunk_rows)
        torch.manual_seed(5)
        module(input, target).loss.backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@both
def test_tied_weights_are_one_parameter_and_train(kind):
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    module = kind(IN, V, K, D)
    assert module.tie_weights(embedding) is module
    model = nn.ModuleDict({"embedding": embedding, "body": nn.Linear(D, IN), "head": module})
    assert sum(parameter is embedding.weight for parameter in model.parameters()) == 1
    words, target = torch.randint(V, (8,)), torch.randint(V, (8,))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = model["head"](model["body"](model["embedding"](words)), target).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert module.decoder.weight is embedding.weight
    with pytest.raises(ValueError, match=r"embedding must have a weight of shape \(23, 5\), got \(23, 6\)"):
        module.tie_weights(nn.Embedding(V, 6))


@both
@pytest.mark.parametrize(
    ("classes", "width", "hidden", "last", "millions"),
    [(10_000, 280, 960, 620, 21.50), (33_278, 300, 1150, 650, 34.90)],
)
def test_parameters_of_the_published_language_models(kind, classes, width, hidden, last, millions):
    """The three-layer LSTMs of zihangdai/mos; totals as in Parthiban et al. 2021, table 2."""
    embedding = nn.Embedding(classes, width, device="meta")
    lstms = [nn.LSTM(a, b, device="meta") for a, b in ((width, hidden), (hidden, hidden), (hidden, last))]
    for lstm in lstms:
        # WeightDrop of the published code keeps both biases of cuDNN's LSTM.
        assert len(list(lstm.parameters())) == 4
    head = kind(last, classes, 15, width, device="meta").tie_weights(embedding)
    model = nn.ModuleList([embedding, *lstms, head])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@both
def test_state_dict_reset_and_repr(data, kind):
    input, _ = data
    module, other = layer(kind), layer(kind, scale=1.0)
    assert set(module.state_dict()) == {
        "prior.weight", "latent.weight", "latent.bias", "decoder.weight", "decoder.bias"
    }  # fmt: skip
    assert not torch.allclose(module.log_prob(input), other.log_prob(input))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.log_prob(input), other.log_prob(input))
    other.reset_parameters()
    assert other.decoder.weight.abs().max() <= 1 / math.sqrt(D)
    assert other.latent.weight.abs().max() <= 1 / math.sqrt(IN)
    first = repr(kind(4, 9, 2, 3, dropout=0.25)).splitlines()[1]
    expected = "  in_features=4, n_classes=9, n_experts=2, expert_features=3, dropout=0.25"
    assert first == expected + (", published=False, chunk_rows=None" if kind is MixtureOfSoftmaxes else "")


@both
def test_reset_and_deferred_initialisation_give_the_very_module(kind):
    def reset_those_with_tensors(module: nn.Module) -> None:
        for part in module.modules():
            if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                part.reset_parameters()

    torch.manual_seed(7)
    new = kind(IN, V, K, D)
    for reset in (lambda module: module.reset_parameters(), reset_those_with_tensors):
        module = kind(IN, V, K, D, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(3.0)
        torch.manual_seed(7)
        reset(module)
        for (name, ours), theirs in zip(module.named_parameters(), new.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


@both
def test_tie_weights_refuses_what_the_decoder_refuses(kind):
    module = kind(IN, V, K, D)
    with pytest.raises(TypeError, match="embedding is computed from other parameters"):
        module.tie_weights(torch.nn.utils.parametrizations.weight_norm(nn.Embedding(V, D)))
    with pytest.raises(ValueError, match=r"of the dtype of the bias, torch\.float32, got torch\.float64"):
        module.tie_weights(nn.Embedding(V, D, dtype=torch.float64))


SHARDED = """
import torch, torch.distributed as dist, monosoftmax as ms
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
input, target = torch.randn(3, 7), torch.arange(3)
for kind in (ms.MixtureOfSoftmaxes, ms.MixtureOfContexts):
    def layer(*names):
        torch.manual_seed(0)
        module = kind(7, 23, 3, 5)
        for name in names:
            fully_shard(module.get_submodule(name), mesh=mesh)
        return module
    plain = layer()
    for names in (("",), ("prior", "latent")):
        sharded = layer(*names)
        assert torch.equal(sharded(input, target).output, plain(input, target).output)
        sharded(input, target).loss.backward()
    assert torch.equal(sharded.log_prob(input), plain.log_prob(input))
    assert torch.equal(sharded.predict(input), plain.predict(input))
    refused = [(layer(""), "log_prob", "prior.weight"), (layer(""), "predict", "prior.weight"),
               (layer("decoder"), "log_prob", "weight")]
    if kind is ms.MixtureOfSoftmaxes:
        refused.append((layer("decoder"), "forward", "decoder.weight"))
    for sharded, name, weight in refused:
        try:
            getattr(sharded, name)(*[input, target][: 2 if name == "forward" else 1])
        except NotImplementedError as error:
            assert str(error).startswith(f"{weight} is a DTensor"), error
            print(name)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_mixtures_work_or_say_what_to_do():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], capture_output=True, text=True)
    methods = ["log_prob", "predict", "log_prob"]
    said = [line for line in run.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said == [*methods, "forward", *methods], run.stderr


def test_expert_features_default_to_in_features():
    assert MixtureOfSoftmaxes(4, 9, 2).decoder.weight.shape == (9, 4)


@pytest.mark.seconds
def test_works_under_compile(data):
    input, target = data
    module = layer(chunk_rows=5)
    compiled = torch.compile(lambda x, t: module(x, t).loss, backend="eager")
    torch.testing.assert_close(compiled(input, target), module(input, target).loss)


# --- refusals ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["in_features", "n_classes", "n_experts", "expert_features"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_sizes(kind, name, value, error):
    sizes = {"in_features": 4, "n_classes": 9, "n_experts": 2, "expert_features": 3, name: value}
    with pytest.raises(error, match=f"^{name} must be .*got"):
        kind(**sizes)


@both
@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_bad_dropout(kind, dropout):
    with pytest.raises(ValueError, match="dropout must be at least 0 and less than 1, got"):
        kind(4, 9, 2, dropout=dropout)


def test_bad_chunk_rows_and_options_without_effect():
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        MixtureOfSoftmaxes(4, 9, 2, chunk_rows=0)
    with pytest.raises(ValueError, match="chunk_rows has no effect with published=True"):
        MixtureOfSoftmaxes(4, 9, 2, published=True, chunk_rows=4)
    with pytest.raises(ValueError, match="backend has no effect with published=True"):
        MixtureOfSoftmaxes(4, 9, 2, published=True, backend="reference")


@pytest.mark.parametrize(
    "make", [MixtureOfSoftmaxes, MixtureOfContexts, lambda *s: MixtureOfSoftmaxes(*s, published=True)]
)
def test_bad_input_and_target(make):
    module = make(IN, V, K)
    input, target = torch.randn(N, IN), torch.zeros(N, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input must have shape \(\.\.\., 7\), got \(12, 6\)"):
        module(input[:, :-1], target)
    with pytest.raises(TypeError, match="input must be float32, bfloat16, float16 or float64, got"):
        module(input.long(), target)
    with pytest.raises(ValueError, match="target must have the shape of input without its last dimension"):
        module(input, target[:-1])
    with pytest.raises(TypeError, match="target must be int64 or uint8 class indices"):
        module(input, target.int())
    for wrong in (V, -1):
        target[3] = wrong
        with pytest.raises(IndexError, match=f"target {wrong} .*is out of bounds for 23 classes"):
            module(input, target)


def test_exported():
    assert ms.MixtureOfSoftmaxes is MixtureOfSoftmaxes
    assert ms.MixtureOfContexts is MixtureOfContexts
