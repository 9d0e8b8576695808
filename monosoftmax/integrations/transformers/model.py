"""f beside the head of a causal language model of transformers: in its logits, in its loss, in its config."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..._dispatch import in_one_fsdp_unit, managed_by_fsdp, number_of_fsdp_modules, outside_of_graphs
from ...checks import IGNORE_INDEX, adapter_in_use, check_transform
from ...functional import TokenStatistics
from ...linear import linear_cross_entropy
from ...transforms import MonotonicTransform, from_dict
from .head_tap import Captured, Inner, attach, inner_of, logits_of, refusal, reshard, tap, unshard
from .targets import loss_of_logits, mean_over, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Base
else:
    _Base = object

logger = logging.getLogger("monosoftmax.integrations.transformers")

Fused = Literal["train", "always", "never"]

#: The tokens whose logits are watched.
_WATCHED = 64

#: Packages that put a forward with a head of their own in the place of a model's, which would leave f out.
_REPLACE_THE_HEAD = {
    "trl": "call monosoftmax.integrations.trl.enable() before you make an SFT, DPO, KTO, GRPO or RLOO trainer; other "
    "trainers that do so cannot have f",
    "liger_kernel": "the model has a fused loss already: leave Liger's out",
    "cut_cross_entropy": "the model has a fused loss already: leave cce_patch out",
    "unsloth": "unsloth computes the loss itself, without f",
    "unsloth_zoo": "unsloth computes the loss itself, without f",
}


#: A loss of tokens: of their hidden states (B, T, D) and the head that makes logits of these, or of their logits
#: (B, T, V) and None; of the f of these logits; and of the targets (B, T), -100 where there is none.
Score = Callable[[Tensor, "nn.Module | None", MonotonicTransform, Tensor], Tensor]


@dataclasses.dataclass
class _Step:
    """What :meth:`MonotonicHead._loss_of` knows of the forward pass that it is called in."""

    transform: nn.Module
    #: The head whose hidden states are ``captured`` for a fused loss.
    head: Any = None
    captured: Captured | None = None
    #: What the model does to its logits; None: to be found out from probes.
    inner: Inner | None = None
    called: bool = False
    statistics: TokenStatistics | None = None
    score: Score | None = None


class MonotonicHead(_Base):
    """What :func:`class_for` puts before a class of transformers: f on its logits, and its loss.

    ``logit_transform`` is f, beside the head, which stays as it is. ``forward(...).logits`` is f of the model's own
    logits, with the model's own scale and cap inside f. With ``labels`` (or ``shift_labels``), the loss is fused with
    the head in training, and there are no logits then.
    """

    logit_transform: MonotonicTransform
    own_attributes: frozenset[str] = frozenset()
    fused: Fused = "train"
    #: Whether each loss leaves the smallest and the largest logit that f sees in ``logit_range``, of some tokens.
    watch_logits: bool = False
    logit_range: Tensor | None = None
    #: The names of the positional arguments of the model's own forward.
    _own_arguments: tuple[str, ...] = ()
    _step: _Step | None = None
    #: What the model does to its logits, once a forward pass has told, and the numbers of the config then.
    _inner: Inner | None = None
    _inner_of: tuple[Any, ...] = ()
    #: Why what it does cannot be fused.
    _not_fusible: str | None = None
    #: f that was chained behind what the model does to its logits; what was told once; when sharding was looked at.
    _chained: tuple[Inner, MonotonicTransform, MonotonicTransform] | None = None
    _warned: bool = False
    _logged: str = ""
    _looked_at: int = -1
    _keep_in_fp32_modules_strict = {"logit_transform"}  # noqa: RUF012, as transformers has it

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not config.logit_transform:
            raise ValueError(
                f"config.logit_transform must say which f {type(self).__name__} has, got {config.logit_transform!r}: "
                "give a model its f with monosoftmax.integrations.transformers.add_transform"
            )
        self.logit_transform = from_dict(config.logit_transform)
        self.loss_type = "ForCausalLM"
        attach(head_of(self))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # What a checkpoint does not have was made by torch.empty.
        if not isinstance(module, MonotonicTransform):
            super()._init_weights(module)
            return
        own = [each for each in [*module._parameters.values(), *module._buffers.values()] if each is not None]
        loaded = [(each, each.clone()) for each in own if getattr(each, "_is_hf_initialized", False)]
        if len(loaded) < len(own):
            module.reset_parameters()
            for each, value in loaded:
                each.copy_(value)

    def _get_name(self) -> str:
        # Trainer shifts the labels of label smoothing if it knows the name of the class.
        return type(self).__name__.removeprefix("FSDP").removeprefix("Monotonic")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            owner = getattr(value, "__func__", value)
            package = getattr(owner, "__globals__", {}).get("__name__", "").partition(".")[0]
            if package in _REPLACE_THE_HEAD:
                raise RuntimeError(
                    f"{package} replaces the forward of {type(self).__name__} by one that leaves out its "
                    f"logit_transform: {_REPLACE_THE_HEAD[package]}"
                )
        super().__setattr__(name, value)

    @property
    def loss_function(self) -> Any:
        return self._loss_of

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        raise AttributeError(
            f"loss_function of {type(self).__name__} must stay its own, which has logit_transform in it. For another "
            "loss, call the model without labels: its logits are f(z) (Trainer does so for compute_loss_func)"
        )

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward, with f.

        Args:
            *args, **kwargs: as for the model's own class.
            labels: (B, T), of which the model's loss shifts the copy that it is given; -100 is ignored.
            shift_labels: (B, T), shifted already.
            num_items_in_batch: what the sum of the losses is divided by; None: the number of targets that count.
            skip_logits: whether the loss is fused with the head, and ``logits`` None. By default as ``fused`` says.

        Raises:
            ValueError: ``skip_logits=True`` without labels.
            NotImplementedError: ``skip_logits=True``, and the head cannot be fused; or the model computes its loss
                itself, without ``loss_function``.
        """
        kwargs = _by_name(self, args, kwargs)
        labels, return_dict = kwargs.pop("labels", labels), kwargs.pop("return_dict", return_dict)
        if return_dict is None:
            return_dict = self.config.return_dict
        _warn_if_frozen(self)
        _check_sharding(self)
        if labels is None and shift_labels is None:
            if skip_logits:
                raise ValueError("skip_logits=True needs labels or shift_labels: there is no loss to be fused")
            output = super().forward(**kwargs, return_dict=True)
            output.logits = self.logit_transform(output.logits)
        else:
            output = self._with_loss(labels, shift_labels, skip_logits, kwargs)
        return output if return_dict else output.to_tuple()

    def scored(
        self,
        score: Score,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward with ``score`` in the place of its loss, such as one of log p of each token.

        It is fused with the head in evaluation, too, unless ``fused`` is "never".

        Args:
            score: gets the targets shifted already.
            *args, labels, shift_labels, **kwargs: as for the model.

        Returns:
            The model's output, without logits. ``loss`` is the score, and what the model adds to its loss.
        """
        kwargs = _by_name(self, args, kwargs)
        _warn_if_frozen(self)
        _check_sharding(self)
        return self._with_loss(kwargs.pop("labels", labels), shift_labels, None, kwargs, score)

    def _with_loss(
        self,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        skip_logits: bool | None,
        kwargs: dict[str, Any],
        score: Score | None = None,
    ) -> Any:
        # The model's own forward calls loss_function if it has labels, and hands on shift_labels.
        kwargs["labels"] = shift_labels if labels is None else labels
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels
        head = head_of(self)
        attach(head)
        reason = refusal(head) or self._not_fusible
        if reason is None and hasattr(head, "unshard") and in_one_fsdp_unit(head, self.logit_transform):
            reason = "fully_shard has it in one unit with logit_transform, and shards it again once f was called"
        wanted = skip_logits
        if wanted is None:
            wanted = self.fused == "always" or (self.fused == "train" and (self.training or score is not None))
        if wanted and reason is not None:
            if skip_logits:
                raise NotImplementedError(
                    f"skip_logits=True needs a head that can be fused with the loss, but {reason}"
                )
            _log_once(self, f"{self._get_name()} holds its logits for the loss: {reason}")
        if not wanted or reason is not None:
            return self._from_logits(kwargs, score)
        if self._inner is None or not (torch.compiler.is_compiling() or self._inner_of == _numbers(self.config)):
            return self._first_fused(head, skip_logits, kwargs, score)
        return self._fused(head, self._inner, Captured(probe=False), kwargs, score)

    def _from_logits(self, kwargs: dict[str, Any], score: Score | None) -> Any:
        self._step = step = _Step(self.logit_transform, score=score)
        try:
            output = super().forward(**kwargs, return_dict=True)
        finally:
            self._step = None
        _check_called(self, step)
        if score is not None:
            return _without_logits(output)
        output.logits = self.logit_transform(output.logits)
        return output

    @outside_of_graphs
    def _first_fused(
        self, head: nn.Module, skip_logits: bool | None, kwargs: dict[str, Any], score: Score | None
    ) -> Any:
        """A fused loss for which the head gives probes, to learn what the model does to its logits."""
        output = self._fused(head, None, Captured(probe=True), kwargs, score)
        if self._not_fusible is None:
            return output
        return self._with_loss(kwargs.pop("labels"), kwargs.pop("shift_labels", None), skip_logits, kwargs, score)

    def _fused(
        self,
        head: nn.Module,
        inner: Inner | None,
        captured: Captured,
        kwargs: dict[str, Any],
        score: Score | None,
    ) -> Any:
        self._step = step = _Step(self.logit_transform, head, captured, inner, score=score)
        tap(head, captured)
        try:
            output = super().forward(**kwargs, return_dict=True)
        finally:
            tap(head, None)
            self._step = None
        _check_called(self, step)
        output = _without_logits(output)
        if step.statistics is not None:
            output["log_prob"], output["entropy"] = step.statistics.log_prob, step.statistics.entropy
            output["is_top1"] = step.statistics.rank == 0
        return output

    def _loss_of(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss as transformers' ``ForCausalLMLoss`` has it. Called by others than the model's own forward, its
        logits are f(z) already.
        """
        step, target = self._step, shifted(labels, shift_labels, ignore_index)
        if step is None:
            return loss_of_logits(logits, target, None, ignore_index, num_items_in_batch)
        step.called = True
        f = check_transform(step.transform)
        if step.captured is None:
            self._watch(logits.flatten(0, -2)[:_WATCHED])
            if step.score is not None:
                return step.score(logits, None, f, target.to(logits.device))
            return loss_of_logits(logits, target, f, ignore_index, num_items_in_batch)
        inner = step.inner or self._learn(step.head, step.captured, logits)
        if inner is None:
            return logits.new_zeros(())
        (hidden,), head = step.captured.hidden, step.head
        # The forward that TRL gives a head in float32 casts; refusal() lets no other through but that of DTensors.
        if "forward" in head.__dict__:
            hidden = hidden.to(head.weight.dtype)
        f, target = self._whole_f(inner, f), target.to(hidden.device)
        unshard(head)
        if self.watch_logits:
            self._watch(logits_of(head, hidden.detach().flatten(0, -2)[:_WATCHED]), inner)
        reduction, scaled = mean_over(num_items_in_batch)
        found: Any
        statistics: Any = not self.training
        if step.score is not None:
            found = step.score(hidden, head, f, target)
        else:
            found = linear_cross_entropy(
                hidden,
                head.weight,
                target,
                f,
                linear_bias=head.bias,
                ignore_index=ignore_index,
                reduction=reduction,
                return_statistics=statistics,
            )
        reshard(head)
        if step.score is not None:
            return found
        if statistics:
            found, step.statistics = found
        return scaled(found)

    def _whole_f(self, inner: Inner, f: MonotonicTransform) -> MonotonicTransform:
        """f of what the model does to its logits, made once: ``torch.compile`` cannot make modules."""
        known = self._chained
        if known is None or known[0] != inner or known[1] is not f:
            known = inner, f, inner.before(f)
            # Not by setattr, which would make f a part of the model twice.
            self.__dict__["_chained"] = known
        return known[2]

    @torch.no_grad()
    def _watch(self, logits: Tensor, inner: Inner | None = None) -> None:
        if self.watch_logits and not torch.compiler.is_compiling():
            ends = torch.stack([logits.min(), logits.max()]).float()
            self.logit_range = ends if inner is None else inner.of(ends)

    def _learn(self, head: Any, captured: Captured, logits: Tensor) -> Inner | None:
        """What the model does to its logits, from the ``logits`` that it has made of probes."""
        if captured.probed is None or len(captured.hidden) != 1:
            self._not_fusible = f"it calls its head {len(captured.hidden)} times"
        elif head.weight.shape[0] != len(captured.probed):
            self._not_fusible = f"its head has {len(captured.probed)} classes, and its weight {head.weight.shape[0]}"
        else:
            self._inner = inner_of(captured.probed, logits)
            self._inner_of = _numbers(self.config)
            if self._inner is None:
                self._not_fusible = "it does more to its logits than to scale and to cap them"
        return self._inner


#: What a model with f may have of its own beside what a plain one has.
MonotonicHead.own_attributes = frozenset(name for name in vars(MonotonicHead) if not name.startswith("__"))


def _by_name(model: MonotonicHead, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model's own forward as keywords."""
    names = model._own_arguments
    if len(args) > len(names):
        raise TypeError(f"{model._get_name()} takes at most {len(names)} positional arguments, got {len(args)}")
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{model._get_name()} got multiple values for {', '.join(twice)}")
    return {**kwargs, **dict(zip(names, args, strict=False))}


def head_of(model: Any) -> nn.Module:
    """The head that is in use: PEFT's wrapper of a head that is trained whole has one for each adapter.

    Raises:
        TypeError: the model has no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"model must be a language model with a head, got {type(model).__name__}")
    in_use: nn.Module = adapter_in_use(head)
    return in_use


def _numbers(config: Any) -> tuple[Any, ...]:
    """The numbers of a config, one of which may scale or cap the logits."""
    return tuple(each for each in vars(config.get_text_config()).values() if each is None or isinstance(each, float))


def _without_logits(output: Any) -> Any:
    # A ModelOutput cannot lose an entry, and would keep the logits of no token.
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _check_called(model: MonotonicHead, step: _Step) -> None:
    if not step.called:
        raise NotImplementedError(
            f"{model._get_name()} computes its loss itself, so that logit_transform would not be in it: call it "
            "without labels, and give its logits, which are f(z), to a loss; of a Trainer, by compute_loss_func"
        )


def _warn_if_frozen(model: MonotonicHead) -> None:
    if not model.training or torch.compiler.is_compiling() or model._warned:
        return
    parameters = list(model.logit_transform.parameters())
    if parameters and torch.is_grad_enabled() and not any(each.requires_grad for each in parameters):
        model._warned = True
        warnings.warn(
            f"logit_transform of {model._get_name()} is frozen, and stays as it is in this training. With PEFT, "
            'modules_to_save=["logit_transform"] trains it',
            stacklevel=4,
        )


def _check_sharding(model: MonotonicHead) -> None:
    """An error if ``fully_shard`` has the model, but not f, whose gradient nobody would then average over ranks."""
    # Looked at once, and again where fully_shard was called since.
    if not model.training or torch.compiler.is_compiling() or model._looked_at == number_of_fsdp_modules():
        return
    model._looked_at = number_of_fsdp_modules()
    managed = managed_by_fsdp()
    left_out = [
        f"logit_transform.{path}.{name}".replace("..", ".")
        for path, module in model.logit_transform.named_modules()
        for name, each in module.named_parameters(recurse=False)
        if each.requires_grad and (module, name) not in managed
    ]
    if left_out and any((each, name) in managed for each in model.modules() for name in each._parameters):
        raise RuntimeError(
            f"fully_shard shards {model._get_name()} without its {', '.join(left_out)}, of which each rank would have "
            "another gradient: leave it out of ignored_params, or call fully_shard(model.logit_transform)"
        )


def _log_once(model: MonotonicHead, message: str) -> None:
    if not torch.compiler.is_compiling() and model._logged != message:
        model._logged = message
        logger.warning(message)
