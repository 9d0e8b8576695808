"""Jobs of ranks that train models of transformers with f and sample from them, and the same by hand in one process."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hands_in_processes import WORLD, whole
from tiny_models import VOCABULARY, pair, plain, rough
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.integrations.transformers import AutoMonotonicModelForCausalLM, TransformCallback, add_transform

STEPS, ROWS, LENGTH, RATE = 3, 4, 12, 0.02
NEW_TOKENS = 16


class Trained(NamedTuple):
    """What a training has come to."""

    losses: list[float]
    #: Of the first step.
    gradients: dict[str, Tensor]
    #: By how much each parameter has changed.
    moved: dict[str, Tensor]
    notes: dict[str, Any]


def data(rows: int = STEPS * ROWS) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which each row ignores another number."""
    tokens = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    ignored = torch.arange(LENGTH) < (torch.arange(rows) * 5 % (LENGTH - 2))[:, None]
    return tokens, tokens.masked_fill(ignored, -100)


def batches(rows: int = ROWS) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(*(each.split(rows) for each in data(STEPS * rows)), strict=True)


def shares(rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The part of each batch that a rank has, and the number of targets that count in the whole batch."""
    mine = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    for tokens, labels in batches():
        yield tokens[mine], labels[mine], (labels[:, 1:] != -100).sum()


def values_of(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(each) for name, each in model.named_parameters()}


def gradients_of(model: Any) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {name: whole(each) for name, each in found.items() if each is not None}


def _difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each - before[name] for name, each in after.items()}


def by_hand(
    name: str, rows: int = ROWS, *, clip: float = 0.0, smoothing: float = 0.0, half: str | None = None
) -> Trained:
    """Gradient descent in one process, on materialised logits.

    ``half``: the weights are rounded to bfloat16 in each forward pass, as FSDP does; "all": so are the parameters of f.
    """
    model, f = plain(name), rough()
    own = dict(model.named_parameters())
    parameters = own | {f"logit_transform.{n}": p for n, p in f.named_parameters()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    losses, gradients = [], {}
    for tokens, labels in batches(rows):
        optimizer.zero_grad()
        weights = {n: p.bfloat16() if half else p for n, p in own.items()}
        of_f = {n: p.bfloat16() if half == "all" else p for n, p in f.named_parameters()}
        z = torch.func.functional_call(model, weights, (tokens,), {"use_cache": False}).logits[:, :-1].flatten(0, 1)
        f_z = torch.func.functional_call(f, of_f, (z.float(),))
        loss = F.cross_entropy(f_z, labels[:, 1:].flatten(), label_smoothing=smoothing)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        optimizer.step()
    return Trained(losses, gradients, _difference({n: p.detach() for n, p in parameters.items()}, before), {})


# --- what launchers and libraries do ----------------------------------------------------------------------------------


@contextlib.contextmanager
def launched() -> Iterator[str]:
    """What a launcher tells a rank, and a folder of its own. What libraries note of it is gone afterwards."""
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType

    before, init, rank = dict(os.environ), AcceleratorState.__init__, str(dist.get_rank())

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        # accelerate has FSDP for GPUs only: on a CPU it would take DDP without a word.
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    AcceleratorState.__init__ = with_fsdp
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    finally:
        AcceleratorState.__init__ = init
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def descend(model: Any, optimizer: Any, backward: Callable[[Tensor], Any], fused: bool | None) -> Trained:
    """Gradient descent on this rank's part of each batch."""
    before, losses, gradients = values_of(model), [], {}
    for tokens, labels, count in shares(dist.get_rank()):
        optimizer.zero_grad()
        output = model(tokens, labels=labels, num_items_in_batch=count, skip_logits=fused)
        backward(output.loss * WORLD)  # whose gradient the ranks average
        total = output.loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        gradients = gradients or gradients_of(model)
        optimizer.step()
    notes = {"class": type(model).__name__, "has logits": output.logits is not None}
    return Trained(losses, gradients, _difference(values_of(model), before), notes)


def by_accelerate(name: str, fused: bool, fsdp: bool) -> Trained:
    """Steps with what ``Accelerator.prepare`` makes of a model."""
    import accelerate

    with launched():
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin if fsdp else None)
        model = pair(name)[1]
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
        return descend(model, optimizer, accelerator.backward, fused)


def by_trainer(
    name: str, fused: bool, rows: int = ROWS, *, fsdp: bool = False, clip: float = 0.0, smoothing: float = 0.0
) -> Trained:
    """Trainer's steps of ``rows`` rows, which accumulate gradients where these are more than ROWS."""
    import transformers as tf

    class First(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            gradients.update({} if gradients else gradients_of(model))

    gradients: dict[str, Tensor] = {}
    with launched() as folder:
        model = pair(name, fused="train" if fused else "never")[1]
        before = values_of(model)
        arguments = tf.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS // WORLD,
            gradient_accumulation_steps=rows // ROWS,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=clip,
            label_smoothing_factor=smoothing,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            fsdp=fsdp,
            fsdp_config={"fsdp_version": 2} if fsdp else None,
        )
        examples = [{"input_ids": a, "labels": b} for a, b in zip(*data(STEPS * rows), strict=True)]
        callbacks = [First(), TransformCallback()]
        trainer = tf.Trainer(model, arguments, train_dataset=examples, callbacks=callbacks)
        trainer.train()
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        logged = [each for each in trainer.state.log_history if "loss" in each][-1]
        names = ("transform/logit_min", "transform/logit_max", "transform/slope_min", "transform/slope_max")
        notes = {"class": type(trainer.model_wrapped).__name__, "logged": [logged.get(name) for name in names]}
        return Trained(losses, gradients, _difference(values_of(trainer.model), before), notes)


def f_of_each_rank() -> str:
    """What the callback says of an f that ranks have trained apart."""
    from types import SimpleNamespace

    model = pair("llama")[1]
    with torch.no_grad():
        model.logit_transform.raw_slope[3] += dist.get_rank()
    try:
        TransformCallback().on_step_end(None, SimpleNamespace(global_step=1), None, model=model)
    except RuntimeError as error:
        return str(error)
    return ""


# --- fully_shard ------------------------------------------------------------------------------------------------------


def sharded(model: Any, layout: str, half: bool = False) -> Any:
    """``model`` with ``fully_shard`` around the units that ``layout`` names, and around the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    f, body = model.logit_transform, model.model
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if half else {}
    if "layers" in layout:
        for each in body.layers:
            fully_shard(each, **options)
    if layout == "head":
        fully_shard(model.lm_head, **options)
    if "norm and head" in layout:
        fully_shard([body.norm, model.lm_head], reshard_after_forward=False, **options)
    if layout == "head and f":
        fully_shard([model.lm_head, f], **options)
    if "f alone" in layout:
        fully_shard(f)
    if layout == "without f":
        options["ignored_params"] = set(f.parameters())
    return fully_shard(model, **options)


def by_fully_shard(layout: str, name: str, fused: bool | None, half: bool = False) -> Trained:
    """Steps of a model with ``fully_shard``."""
    model, seen = sharded(pair(name)[1], layout, half), set()
    model.logit_transform.register_forward_pre_hook(lambda f, _: seen.update(p.dtype for p in f.parameters()))
    found = descend(model, torch.optim.SGD(model.parameters(), lr=RATE), Tensor.backward, fused)
    stays = {each.dtype for each in model.parameters()}
    return found._replace(notes=found.notes | {"f in forward": seen, "parameters": stays})


def words_of_errors() -> dict[str, str]:
    """What is said where f would be left out of FSDP."""

    def words(run: Callable[[], Any]) -> str:
        try:
            run()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    tokens, labels = data()
    without_f = sharded(pair()[1], "without f")
    frozen = pair()[1]
    frozen.logit_transform.requires_grad_(False)
    frozen = sharded(frozen, "without f")
    both = sharded(pair()[1], "head and f")
    return {
        "left out": words(lambda: without_f(tokens, labels=labels)),
        "left out, evaluation": words(lambda: without_f.eval()(tokens)),
        "left out, frozen": words(lambda: frozen(tokens, labels=labels)),
        "one unit": words(lambda: both(tokens, labels=labels, skip_logits=True)),
        "afterwards": words(lambda: add_transform(_plainly_sharded(), rough())),
    }


def _plainly_sharded() -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(plain())


def after_evaluation() -> float:
    """The loss of logits after a step, where a fused evaluation came between the backward pass and the step."""
    model = sharded(pair()[1], "head")
    model.fused = "always"
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    (tokens, labels, count), second, _ = shares(dist.get_rank())
    (model(tokens, labels=labels, num_items_in_batch=count).loss * WORLD).backward()
    with torch.no_grad():
        model.eval()(tokens, labels=labels)
    model.reshard()  # what fully_shard leaves whole in evaluation: the root alone
    optimizer.step()
    options = {"labels": second[1], "num_items_in_batch": second[2], "skip_logits": False}
    loss = model.train()(second[0], **options).loss.detach()
    dist.all_reduce(loss)
    return loss.item()


# --- samples ----------------------------------------------------------------------------------------------------------


def sampled(model: Any, prompt: Tensor, new: int = NEW_TOKENS, *, sample: bool, **arguments: Any) -> Tensor:
    """``prompt`` and new tokens, of a few likely ones."""
    torch.manual_seed(3)
    options = {"do_sample": sample, "min_new_tokens": new, "max_new_tokens": new} | ({"top_k": 0} if sample else {})
    return model.generate(prompt, **options, **arguments)


def spread_out() -> ms.transforms.MonotonicTransform:
    """An f that samples tell from the identity: the logits of tiny models are small."""
    return ms.transforms.Chain(ms.transforms.Scale(6.0), rough(8.0))


def sharded_samples(name: str, layout: str) -> list[Tensor]:
    """Samples of FSDP, of which each rank wants another number."""
    model, rank = sharded(pair(name, spread_out())[1], layout).eval(), dist.get_rank()
    prompt = data()[0][:2, : 5 - rank]
    return [sampled(model, prompt, NEW_TOKENS - 4 * rank, sample=each, synced_gpus=True) for each in (False, True)]


# --- loaded in parts --------------------------------------------------------------------------------------------------


def in_parts(path: str, how: str, transform: Any = None) -> Any:
    """A model of which each rank loads a part, for tensor parallelism ("tp") or FSDP ("fsdp")."""
    from transformers.distributed.configuration_utils import DistributedConfig

    options = {"tp_plan": "auto"} if how == "tp" else {"distributed_config": DistributedConfig(fsdp_size=WORLD)}
    return AutoMonotonicModelForCausalLM.from_pretrained(path, transform, **options)


def by_parts(path: str, folder: str, how: str, given: bool, fused: bool) -> Trained:
    """Steps of a model loaded in parts, which is saved to ``folder``; ``given``: f is no part of the checkpoint."""
    with launched():
        model = in_parts(path, how, rough() if given else None).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, foreach=False)
        if how == "fsdp":
            found = descend(model, optimizer, Tensor.backward, fused)
        else:
            found = _tensor_parallel_steps(model, optimizer, fused)
        model.save_pretrained(folder)
        return found


def _tensor_parallel_steps(model: Any, optimizer: Any, fused: bool) -> Trained:
    before, losses, gradients, notes = values_of(model), [], {}, {}
    model.watch_logits = True
    for tokens, labels in batches():
        optimizer.zero_grad()
        if not notes:
            with torch.no_grad():
                notes["logits"] = model.eval()(tokens).logits
        output = model.train()(tokens, labels=labels, skip_logits=fused)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients = gradients or gradients_of(model)
        notes.setdefault("range", model.logit_range.tolist())
        optimizer.step()
    notes["placements"] = str(model.get_output_embeddings().weight.placements)
    return Trained(losses, gradients, _difference(values_of(model), before), notes)


def samples_in_parts(path: str, how: str) -> list[Tensor]:
    with launched():
        model = in_parts(path, how).eval()
        return [sampled(model, data()[0][:2, :5], sample=each) for each in (False, True)]


def words_of_plain_parts(path: str) -> str:
    with launched():
        try:
            in_parts(path, "fsdp", rough())
        except ValueError as error:
            return str(error)
    return ""


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def by_deepspeed(name: str) -> Trained:
    """Steps of ZeRO-3."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, which takes minutes
    config = {
        "train_micro_batch_size_per_gpu": ROWS // WORLD,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    with launched():
        model = pair(name)[1]
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def of_all(read: Callable[[Any], Tensor]) -> dict[str, Tensor]:
            return {n: read(p).clone() for n, p in model.named_parameters()}

        before, losses, gradients = of_all(safe_get_full_fp32_param), [], {}
        for tokens, labels, count in shares(dist.get_rank()):
            output = engine(tokens, labels=labels, num_items_in_batch=count)
            engine.backward(output.loss * WORLD)
            total = output.loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item())
            gradients = gradients or of_all(safe_get_full_grad)
            engine.step()
        notes = {"has logits": output.logits is not None}
        return Trained(losses, gradients, _difference(of_all(safe_get_full_fp32_param), before), notes)


#: References that many tests share.
reference = functools.cache(by_hand)
