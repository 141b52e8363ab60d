"""The wrapper: a backbone with exits, as a transformers model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from erde_hub._arguments import threshold_rows
from erde_hub._version import __version__
from erde_hub.backbones import BackboneAdapter, find_adapter, get_adapter
from erde_hub.backbones.decoders import check_readout, create_heads, exit_layers
from erde_hub.backbones.layouts import FeatureFormats
from erde_hub.backbones.rebuild import check_config_builds
from erde_hub.backbones.shrink_check import check_exits_run
from erde_hub.backbones.tracing import trace
from erde_hub.calibration import Calibrator, calibrator_name, create_calibrator
from erde_hub.config import EarlyExitConfig, read_field
from erde_hub.engine.features import last_linears, place_feature_hooks
from erde_hub.engine.forward import route, run_all
from erde_hub.engine.inputs import NO_GRAPH, explain_failure
from erde_hub.engine.recomputation import is_recomputing, recomputing
from erde_hub.engine.routing import PlanCache, RoutingPlan
from erde_hub.engine.runner import ExitRunner
from erde_hub.errors import (
    ConfigError,
    ErdeError,
    ExitPointError,
    ExportError,
    InputTypeError,
    NotSupportedError,
    ShapeError,
    ThresholdError,
    nearest,
)
from erde_hub.heads import ExitHead, ExitHeads, FeatureSpec, HeadKey
from erde_hub.losses.exit_weights import weights_per_exit
from erde_hub.outputs import EarlyExitOutput
from erde_hub.policies import (
    ExitPolicy,
    IntervalWidthPolicy,
    PolicyKey,
    check_answers,
    check_no_early_exit,
    plain_threshold,
    policy_for,
    policy_name,
)
from erde_hub.prediction_sets import ConformalClassifier
from erde_hub.stored_sets import StoredSets
from erde_hub.tasks import REGRESSION, refuse_regression

from .attach import check_problem_type, choose_exits, class_names, count_classes, inspect_backbone, new_layers
from .learning_check import LearningCheck
from .pretrained import EarlyExitPreTrainedModel, check_layouts
from .truncated import TruncatedModel, truncate

logger = logging.get_logger(__name__)

CLASSIFIER = "classifier"
#: Arguments that the forward pass takes by place.
_POSITIONAL = 5


class EarlyExitWrapper(EarlyExitPreTrainedModel):
    """A backbone with early exits.

    In train mode, and with ``output_all_exits=True``, one pass runs every exit. In eval mode each sample takes the
    first exit at which the policy is confident; later layers run on the remaining samples only, and not at all where
    none remain. Wrapping changes no weight and no output: where no sample can exit early, the answer is the backbone's,
    bit for bit.

    Args:
        model: A timm model, an image or text classifier of transformers, any nn.Module that maps a batch to logits
            (N, K), or an :class:`EarlyExitConfig` to build the same model from.
        exits: Module names, shallow to deep (:func:`list_exit_points` lists the usual ones); an int n for n places
            evenly spaced in MACs; ``"auto"`` for a good choice, which is logged with its reason.
        head: Key of the heads table; None is ``fc``, and ``lm`` for a causal language model.
        policy: Key of the policies table; None is ``entropy``, and ``never`` for a regression.
        threshold: One number, or one per early exit; None takes the policy's default.
        input_size: Shape of one input without the batch; for texts the number of tokens that costs are counted at.
            Known for models of timm and transformers.
        example_inputs: Batch-first tensors instead of ``input_size``.
        backbone_kwargs: What the backbone was created with, the number of classes aside. They cannot be read off a timm
            model, so wrapping rebuilds it from the config and compares. Not for transformers models, which know theirs.
        head_kwargs: Arguments of the head.
        policy_kwargs: Arguments of the policy.
        exit_weights: Weight of each exit's cross-entropy in ``loss``, classifier last, or a preset's name
            (:func:`erde_hub.losses.exit_weights_preset`); None is all 1.
        id2label: Class names, as a list or as ``{0: "cat", ...}``; a transformers model brings its own.
        problem_type: ``"regression"`` for a backbone that answers with D real numbers, (N, D): ``loss`` is the mean
            squared error, and the policies are ``never`` and ``set_size``. None is a classifier, or what the config of
            a transformers model says.
        feature_format: How the axes of what exits read lie, ``NCHW``, ``NHWC``, ``NLC`` or ``NCL``: one for all exits,
            one per exit, or by their names. Needed only where it cannot be told; kept in the config's
            ``exit_features``.
        backbone: With a config: the living backbone, for configs that cannot rebuild it.

    Raises:
        ExitPointError: See :func:`~erde_hub.backbones.base.resolve_exits`; also exits inside residual blocks.
        RebuildError: The config would build another backbone; the message names ``backbone_kwargs``.
        ConfigError: Unknown head, policy or argument.
        ThresholdError: A threshold that the policy does not take.
        InputTypeError: Not a classifier.

    Example:
        >>> model = EarlyExitWrapper(timm.create_model("resnet18", num_classes=10), exits=["layer1", "layer2"])
        >>> out = model.eval()(torch.randn(8, 3, 224, 224), threshold=1.0)
        >>> out.logits.shape, out.exit_index.shape
        (torch.Size([8, 10]), torch.Size([8]))
    """

    #: Why the exits sit where they do, in words; None where they were named, and for a loaded checkpoint.
    exits_reason: str | None = None
    heads: ExitHeads
    _plans: PlanCache
    #: Subclasses with methods that only models of one task have, by task.
    _by_task: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, task: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if task is not None:
            cls._by_task[task] = cls

    def __new__(cls, model: nn.Module | EarlyExitConfig | None = None, *args: Any, **kwargs: Any) -> EarlyExitWrapper:
        """Makes a model of the class for its task; a subclass of the user's own stays what it is."""
        if isinstance(model, (EarlyExitConfig, nn.Module)):
            task = model.task if isinstance(model, EarlyExitConfig) else find_adapter(model).task(model)
            kind = cls._by_task.get(task, EarlyExitWrapper)
            if cls is EarlyExitWrapper:
                cls = kind
            elif not issubclass(cls, kind):
                logger.warning(
                    f"{cls.__name__} lacks what {kind.__name__} adds, such as generate(): derive it from that"
                )
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module | EarlyExitConfig,
        exits: Sequence[str] | int | str = "auto",
        *,
        head: HeadKey | None = None,
        policy: PolicyKey | None = None,
        threshold: float | Sequence[float] | None = None,
        input_size: Sequence[int] | None = None,
        example_inputs: Sequence[Tensor] | Tensor | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        head_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        exit_weights: str | Sequence[float] | None = None,
        id2label: Sequence[str] | dict[int, str] | None = None,
        problem_type: str | None = None,
        feature_format: str | Sequence[str] | Mapping[str, str] | None = None,
        backbone: nn.Module | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            key = next(iter(unknown))
            allowed = [n for n in EarlyExitWrapper.__init__.__annotations__ if n not in ("unknown", "return", "model")]
            raise ConfigError(
                f"EarlyExitWrapper has no argument {key!r}{nearest(key, allowed)} (it takes: {', '.join(allowed)})"
            )
        if isinstance(model, EarlyExitConfig):
            self._build(model, backbone)
            return
        if backbone is not None:
            raise ConfigError("backbone= goes with a config; hand the module in as the first argument instead")
        if isinstance(model, nn.Module):
            check_layouts(model)
        adapter, facts, inputs = inspect_backbone(model, input_size, example_inputs)
        traced = trace(model, inputs)
        problem_type = check_problem_type(problem_type, facts.get("problem_type"))
        num_labels = count_classes(model, adapter, traced, problem_type)
        points, reason = choose_exits(adapter, model, exits, traced, inputs, FeatureFormats(feature_format, exits))
        if isinstance(exits, (int, str)):
            logger.info(f"exits={exits!r}: {reason}")
        names = list(exits) if not isinstance(exits, (int, str)) else [p.name for p in points]
        config = EarlyExitConfig(
            library=adapter.library,
            architecture=facts["architecture"],
            backbone_kwargs=adapter.creation_arguments(model, backbone_kwargs),
            task=adapter.task(model),
            problem_type=problem_type,
            exits=names,
            exit_features=[p.spec.to_dict() for p in points],
            head=head or ("lm" if adapter.task(model) == "causal_lm" else "fc"),
            head_kwargs=head_kwargs,
            policy=policy,
            policy_kwargs=policy_kwargs,
            threshold=threshold if threshold is None else plain_threshold(threshold),
            exit_weights=exit_weights if exit_weights is None or isinstance(exit_weights, str) else list(exit_weights),
            input_size=facts["input_size"],
            preprocessing=facts["preprocessing"],
            erde_hub_version=__version__,
            **class_names(id2label if id2label is not None else facts.get("id2label"), num_labels, adapter.task(model)),
        )
        specs = [p.spec for p in points]
        rebuilt = adapter.check_rebuild(model, config)
        config.exit_hooks = check_exits_run(adapter, model, rebuilt, names, specs, inputs)
        if config.head == "lm" and rebuilt is not None and not next(rebuilt.parameters()).is_meta:
            check_readout(rebuilt, specs[0])
        del rebuilt  # as large as the model
        super().__init__(config)
        self.exits_reason = reason if isinstance(exits, (int, str)) else None
        self._assemble(adapter, model, adopted=True)

    def _build(self, config: EarlyExitConfig, backbone: nn.Module | None) -> None:
        if backbone is not None and not isinstance(backbone, nn.Module):
            raise InputTypeError(f"backbone must be an nn.Module, got {type(backbone).__name__}")
        config.check()
        if not config.exits:
            raise ExitPointError("the config names no exits: set exits=['stage', ...]")
        adapter = get_adapter(config.library)
        super().__init__(config)
        module = adapter.build(config) if backbone is None else backbone
        self._assemble(adapter, module, adopted=backbone is not None)

    def _assemble(self, adapter: BackboneAdapter, backbone: nn.Module, adopted: bool) -> None:
        config = self.config
        names = list(config.exits or [])
        runner = ExitRunner(adapter, backbone, names, config.exit_hooks)
        if config.exit_features:
            specs = [FeatureSpec.from_dict(values) for values in config.exit_features]
        else:
            specs = [adapter.declared_spec(backbone, name) for name in names]
            right = [name for name, _ in backbone.named_modules() if name in names]
            if names != right:
                raise ExitPointError(f"exits must run from shallow to deep: got {names}, the order is {right}")
            config.exit_features = [spec.to_dict() for spec in specs]
        self._adapter = adapter
        self._runner = runner
        self._plans = PlanCache()
        self._learning_check = LearningCheck()
        self.backbone = backbone
        if config.task == "causal_lm":
            exit_layers(backbone, names)
        self.heads = ExitHeads(
            create_heads(config.head, specs, config.num_outputs, backbone, **(config.head_kwargs or {}))
        )
        self.policy = policy_for(config.problem_type, str(config.policy), **(config.policy_kwargs or {}))
        self._regression = config.problem_type == REGRESSION
        self.calibrator: Calibrator | None = None
        if config.calibrator is not None:
            self.calibrator = create_calibrator(config.calibrator, **(config.calibrator_kwargs or {}))
            self.calibrator.check_exits(config.num_exits)
        self._backbone_frozen = False
        self._costs = {}
        self.main_input_name = "input_ids" if adapter.is_text(backbone) else "pixel_values"
        on_meta = torch.get_default_device().type == "meta"  # while a checkpoint is loaded
        if not adopted:
            for name, spec in zip(names, specs, strict=True):
                adapter.check_spec(backbone, name, spec)
        weight = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        if adopted and weight is not None and not on_meta:
            self.heads.to(weight.device, weight.dtype)
            self.policy.to(weight.device)
            if self.calibrator is not None:
                self.calibrator.to(weight.device)
        if self._regression:
            self._check_policy(self.policy)
        place_feature_hooks(self)
        self._keep_weights(on_meta, adopted)
        recomputed = recomputing(backbone)
        self.supports_gradient_checkpointing = adapter.set_gradient_checkpointing(backbone, False)
        if recomputed:
            adapter.set_gradient_checkpointing(backbone, True)  # in the form that exits need
            for module, flag in recomputing(backbone):
                setattr(module, flag, (module, flag) in recomputed)
        self._find_shared_weights(adopted)
        self.post_init()
        # The backbone keeps its modes, layer by layer: some of them may have been put in eval mode.
        self.training = backbone.training
        self.heads.train(self.training)
        self.policy.train(self.training)

    # What the model is

    @property
    def exit_names(self) -> list[str]:
        """Names of all exits, shallow to deep; the last is the backbone's own classifier."""
        return [*(self.config.exits or []), CLASSIFIER]

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return self.config.num_exits

    @property
    def threshold(self) -> float | list[float]:
        """The stored threshold: one number, or one per early exit. Setting it checks it."""
        return self.config.threshold  # type: ignore[return-value]

    @threshold.setter
    def threshold(self, value: float | Sequence[float]) -> None:
        self.routing_plan(plain_threshold(value))
        self.config.threshold = plain_threshold(value)
        self.config.threshold_profile = None  # how an earlier one was chosen
        if (self.config.prediction_sets or {}).get("routed"):
            self.config.prediction_sets = None  # fitted for the exits that samples took at it

    def routing_plan(self, threshold: float | Sequence[float] | None = None) -> RoutingPlan:
        """Returns what routing at a threshold needs: heads, policy, calibrator, checked thresholds.

        It is kept until a part of the model, or the threshold, is another.

        Args:
            threshold: One number, or one per early exit; None takes the stored one.

        Raises:
            ThresholdError: A threshold that the policy does not take.
        """
        if threshold is None:
            threshold = read_field(self.config, "threshold")
        modules: Any = self._modules
        runner = self._runner if self._runner.backbone is modules["backbone"] else self.runner
        several = type(threshold) is list
        types = [*map(type, threshold)] if several else [type(threshold)]  # type: ignore[arg-type]
        # Types come first: 1 is True, and a tensor is compared with no number.
        made_from = [
            *types,
            several,
            threshold,
            runner.compiler,
            *modules.values(),
            *modules["heads"].active._modules.values(),
        ]
        kept = self._plans.latest
        if kept is not None and kept[0] == made_from:
            return kept[1]
        plan = self._plan(runner, threshold)
        if {*types} <= {int, float}:
            made_from[len(types) + 1] = [*threshold] if several else threshold  # type: ignore[misc]
            self._plans.latest = made_from, plan
        return plan

    def _plan_for(self, threshold: Any, samples: Tensor) -> RoutingPlan:
        """Returns the plan for a batch, whose samples may have thresholds of their own."""
        if not hasattr(threshold, "shape"):
            return self.routing_plan(threshold)
        rows = threshold_rows(threshold, len(samples), self.num_exits - 1)
        if rows is None:
            return self.routing_plan(threshold)
        policy, distinct = self.policy, {*map(tuple, rows)}
        if len(distinct) < 2:  # one sample, for example, or none
            return self.routing_plan([*distinct.pop()] if distinct else None)
        checked = {own: self._check_threshold([*own]) for own in distinct}
        numbers = [[math.nan if policy.never_leaves(value) else value for value in checked[tuple(own)]] for own in rows]
        columns = torch.tensor(numbers, dtype=torch.float32, device=samples.device).unbind(1)
        return RoutingPlan(self.runner, self.runner.heads([*self.heads.active]), policy, self.calibrator, columns)

    def _plan(self, runner: ExitRunner, threshold: Any) -> RoutingPlan:
        thresholds = self._check_threshold(threshold)
        return RoutingPlan(runner, runner.heads([*self.heads.active]), self.policy, self.calibrator, thresholds)

    def _check_threshold(self, threshold: Any) -> list[float]:
        if self._regression:  # model.policy may have been set by hand
            check_answers(REGRESSION, self.policy)
        thresholds = self.policy.check_threshold(threshold, self.num_exits - 1)
        if self.config.task == "causal_lm":
            check_no_early_exit(self.policy, thresholds)
        return thresholds

    def set_calibrator(self, calibrator: Calibrator | None) -> None:
        """Stores a fitted calibrator with the model, or takes it off; routed logits are calibrated from then on.

        A stored threshold speaks of the probabilities before: choose it anew on calibrated records.

        Raises:
            InputTypeError: Not a calibrator of the table.
            ShapeError: Fitted for another number of exits.
        """
        config = self.config
        if calibrator is None:
            self.calibrator, config.calibrator, config.calibrator_kwargs = None, None, {}
        else:
            name = calibrator_name(calibrator) if isinstance(calibrator, Calibrator) else None
            if name is None:
                raise InputTypeError(
                    f"a calibrator of the table is needed (erde_hub.calibration.list_calibrators()), got"
                    f" {type(calibrator).__name__}: register your own class with register_calibrator"
                )
            if config.task != "classification":
                raise ConfigError(f"calibrators are for classification, this model's task is {config.task!r}")
            refuse_regression(config.problem_type, type(calibrator).__name__)
            calibrator.check_exits(self.num_exits)
            config.calibrator, config.calibrator_kwargs = name, calibrator.settings()
            self.calibrator = calibrator.to(self.device).eval()
        config.threshold_profile = config.prediction_sets = None  # chosen and fitted on other probabilities
        place_feature_hooks(self)

    @property
    def prediction_sets(self) -> StoredSets | None:
        """The stored prediction sets, which ``output_sets=True`` returns; None where there are none."""
        stored = self.config.prediction_sets
        return None if stored is None else StoredSets.from_dict(stored, self.num_exits)

    def set_prediction_sets(self, sets: ConformalClassifier | None) -> None:
        """Stores fitted prediction sets with the model, or takes them off.

        They are saved with the checkpoint, exported, and served. :meth:`set_calibrator` takes them off, and so does
        another :attr:`threshold` if they were fitted with ``exit_index``.

        Args:
            sets: Fitted with ``randomized=False`` on records of this model, calibrated ones where it has a calibrator.

        Raises:
            InputTypeError: Not a :class:`~erde_hub.prediction_sets.ConformalClassifier`.
            ConfigError: Sets with a random part, or a model that is no classifier.
            ShapeError: Fitted for another number of exits.
        """
        if sets is not None and not isinstance(sets, ConformalClassifier):
            raise InputTypeError(
                f"a ConformalClassifier is needed, got {type(sets).__name__}: sets that read all exits, as AVCS do, are"
                " not known where a sample exits early; compute them of output_all_exits=True"
            )
        if sets is not None:
            refuse_regression(self.config.problem_type, "ConformalClassifier")
            if self.config.task != "classification":
                raise ConfigError(f"prediction sets are for classification, this model's task is {self.config.task!r}")
        stored = None if sets is None else sets.stored().to_dict()
        self.config.prediction_sets = None if stored is None else StoredSets.from_dict(stored, self.num_exits).to_dict()

    def set_policy(self, policy: ExitPolicy, threshold: float | Sequence[float] | None = None) -> None:
        """Replaces the policy, by a fitted one for example, and its threshold.

        Args:
            policy: Of the table.
            threshold: One number, or one per early exit; None takes the policy's default.

        Raises:
            InputTypeError: Not a policy.
            UnknownNameError: A class that is not in the table, which no checkpoint could name.
            ThresholdError: A threshold that the policy does not take.
        """
        if not isinstance(policy, ExitPolicy):
            raise InputTypeError(f"a policy is needed, got {type(policy).__name__}: create_policy(name) makes one")
        self._check_policy(policy)
        name = policy_name(policy)
        value = policy.default_threshold if threshold is None else threshold
        policy.check_threshold(value, self.num_exits - 1)
        self.policy = policy.to(self.device)
        self.policy.train(self.training)
        self.config.policy, self.config.policy_kwargs = name, policy.settings()
        place_feature_hooks(self)
        self.threshold = value

    def _check_policy(self, policy: ExitPolicy) -> None:
        """Checks that a policy is one for the model's answers, classes or real numbers, and for its exits.

        Raises:
            ConfigError: A policy for the other kind of answers.
            ShapeError: Fitted for other exits.
        """
        check_answers(self.config.problem_type, policy)
        if isinstance(policy, IntervalWidthPolicy):
            sizes = [layer.in_features for layer in last_linears(self).values()]
            if (policy.feature_sizes, policy.num_targets) != (sizes, self.config.num_labels):
                raise ShapeError(
                    f"{type(policy).__name__} was fitted for features {policy.feature_sizes} and {policy.num_targets}"
                    f" targets, the exits have {sizes} and {self.config.num_labels}: fit it on records of this model"
                )

    def truncate(self, exit: int | str) -> TruncatedModel:
        """Returns the static network up to an exit, given by index or name, as a model of its own.

        See :class:`~erde_hub.TruncatedModel`: it is saved, loaded, exported and compiled like any model.

        Raises:
            ExitPointError: No such exit.
        """
        return truncate(self, exit)

    def compile_stages(self, **options: Any) -> None:
        """Compiles what lies between the exits, for inference; see :mod:`erde_hub.engine.compilation`.

        Answers stay what they are, to the accuracy of the compiler's arithmetic. Parts are compiled when they first
        run. Checkpoints, pickles, copies and training know nothing of it.

        Args:
            **options: Keyword arguments of ``torch.compile``, such as ``backend`` and ``mode``.

        Raises:
            ExitPointError: A backbone whose stages are not known.
        """
        self.runner.compile(options)

    # What transformers' models have

    def _text_backbone(self, method: str) -> Any:
        if self.main_input_name != "input_ids":
            raise NotSupportedError(
                f"{method}(): {type(self.backbone).__name__} reads images and has no table of tokens; its layers are in"
                " model.backbone"
            )
        return self.backbone

    def get_input_embeddings(self) -> nn.Module:
        """Returns the backbone's table of tokens.

        Raises:
            NotSupportedError: The backbone reads images.
        """
        return self._text_backbone("get_input_embeddings").get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's table of tokens by one of the same size.

        Raises:
            NotSupportedError: The backbone reads images.
        """
        self._text_backbone("set_input_embeddings").set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As of the backbone, whose new size the config then holds.

        Raises:
            NotSupportedError: The backbone reads images; a language model, whose exits answer with its tokens.
        """
        backbone = self._text_backbone("resize_token_embeddings")
        if self.config.task == "causal_lm" and (args or kwargs):
            raise NotSupportedError(
                "resize_token_embeddings(): the exits of a language model answer with its tokens: resize the model"
                " first, then wrap it"
            )
        table = backbone.resize_token_embeddings(*args, **kwargs)
        self.config.backbone_kwargs = self._adapter.creation_arguments(backbone, None)
        return table

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """As of the backbone; the config keeps it.

        Raises:
            NotSupportedError: The backbone is no transformers model.
        """
        if not isinstance(self.backbone, PreTrainedModel):
            raise NotSupportedError(
                f"set_attn_implementation(): {type(self.backbone).__name__} is no transformers model and chooses its"
                " attention itself (timm.layers.set_fused_attn for models of timm)"
            )
        self.backbone.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config.backbone_kwargs = self._adapter.creation_arguments(self.backbone, None)

    # Training

    def freeze_backbone(self) -> None:
        """Trains the heads alone: no gradients in the backbone, and its layers stay in eval mode under ``train()``.

        Layers of it that have no trained weights, such as the new classifier of a pretrained encoder, are trained with
        the heads, which is logged as a warning.
        """
        self.backbone.requires_grad_(False)
        new = new_layers(self.backbone)
        for layer in new.values():
            layer.requires_grad_(True)
        if new:
            logger.warning(
                "%s of the backbone have no trained weights, so that they are trained with the heads", ", ".join(new)
            )
        self._backbone_frozen = True
        self.backbone.eval()

    def unfreeze_backbone(self) -> None:
        """Trains the whole model again after :meth:`freeze_backbone`."""
        self.backbone.requires_grad_(True)
        self._backbone_frozen = False
        self.train(self.training)

    def train(self, mode: bool = True) -> EarlyExitWrapper:
        """Sets the mode of everything but a frozen backbone, whose batch-norm statistics would move."""
        super().train(mode)
        if getattr(self, "_backbone_frozen", False):
            self.backbone.eval()
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, **_: Any) -> None:
        self._adapter.set_gradient_checkpointing(self.backbone, enable)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the backbone recomputes activations in the backward pass."""
        return is_recomputing(self.backbone)

    # The forward pass

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        threshold: float | Sequence[float] | Tensor | None = None,
        output_all_exits: bool = False,
        return_dict: bool | None = None,
        *,
        output_sets: bool = False,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> EarlyExitOutput | tuple[Any, ...]:
        """Routes in eval mode; runs every exit in train mode and with ``output_all_exits``.

        Args:
            pixel_values: (N, C, H, W) float, preprocessed; for image models.
            labels: (N,) int64 class indices, for language models (N, L) token ids, for a regression (N, D) floats; with
                them ``loss`` is set.
            threshold: For this call only: one number, or one per early exit; as a tensor or array also one per sample,
                (N, 1) or (N,), or one per sample and early exit, (N, len(exits)).
            output_all_exits: No routing: every exit, in eval mode too.
            return_dict: False returns a tuple of what is set.
            output_sets: Also the prediction set of each answer, ``sets``; see :meth:`set_prediction_sets`.
            input_ids: (N, L) integers from the tokenizer; for text models.
            attention_mask: (N, L), 0 where a text is padded.
            token_type_ids: (N, L), for backbones that take them.
            position_ids: (N, L) or (1, L), for backbones that take them.
            inputs_embeds: (N, L, C), instead of ``input_ids``.
            **kwargs: Passed on to the backbone's own forward, where its stages are not known.

        Raises:
            ShapeError: Inputs or labels of the wrong shape.
            InputTypeError: Inputs or labels of the wrong type, or that the backbone does not take.
            LabelError: Labels outside the classes.
            ThresholdError: A threshold that the policy does not take, or one where every exit runs.
            ExitNotReachedError: An exit did not fire.
            ConfigError: ``output_sets`` in train mode, or of a model without prediction sets.
        """
        if output_sets and (self.training or self.prediction_sets is None):
            raise ConfigError(
                "output_sets=True needs eval mode and stored prediction sets:"
                " model.set_prediction_sets(ConformalClassifier.fit(records, randomized=False))"
            )
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = self._inputs(pixel_values, texts, kwargs)
        if labels is not None:
            labels = self._labels(labels, inputs)
        try:
            if self.training or output_all_exits:
                if threshold is not None:
                    raise ThresholdError(
                        f"threshold={threshold!r} has no effect where every exit runs: call model.eval(), without"
                        " output_all_exits, to route"
                    )
                calibrator = None if self.training else self.calibrator
                heads = self.heads.active
                output = run_all(self.runner, [*heads], inputs, training=self.training, calibrator=calibrator)
                if self.training and output.exit_logits is not None:
                    self._learning_check.watch(self.backbone, heads, output.exit_logits)
            else:
                output = route(self._plan_for(threshold, inputs.main), inputs)
        except (ErdeError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            typed = self._adapter.explain_failure(self.backbone, inputs.kwargs) or explain_failure(
                error, inputs, self.config.input_size or (), self.dtype
            )
            if typed is error:
                raise
            raise typed from error
        if labels is not None:
            output.loss = self._loss(output, labels)
        if output_sets:
            output.sets = self._sets_of(output)
        if return_dict is None:
            return_dict = read_field(self.config, "return_dict")
        return output if return_dict else output.to_tuple()

    def _slow_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What torch calls in place of :meth:`forward` while it traces; its old exporter gives every argument by place.

        Raises:
            ExportError: The old ONNX exporter was given the model itself.
        """
        if torch.onnx.is_in_onnx_export() and len(inputs) > _POSITIONAL:
            raise ExportError(
                "torch.onnx.export(dynamo=False) cannot write a model with exits: erde_hub.export.export_onnx writes"
                " all of it, and torch.onnx.export takes the network of one exit, model.truncate(exit)"
            )
        return super()._slow_forward(*inputs, **kwargs)

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` asks first.

        Raises:
            ExportError: Always.
        """
        raise ExportError(NO_GRAPH)

    def _sets_of(self, output: EarlyExitOutput) -> Tensor:
        """Sets of the routed answers, or where every exit was run of the last exit's."""
        logits, stored = output.logits, self.prediction_sets
        index = output.exit_index
        if index is None:
            index = torch.full((len(logits),), self.num_exits - 1)  # type: ignore[arg-type]
        found = stored.sets(logits.detach().double().cpu().numpy(), index.cpu().numpy())  # type: ignore[union-attr]
        return torch.from_numpy(found).to(logits.device)  # type: ignore[union-attr]

    def _loss(self, output: EarlyExitOutput, labels: Tensor) -> Tensor:
        """Loss of the answer, or where every exit was run the weighted sum of the exits' losses."""
        if output.exit_logits is None:
            return self._loss_of(output.logits, labels)  # type: ignore[arg-type]
        weights = weights_per_exit(self.config.exit_weights or "uniform", len(output.exit_logits))
        return torch.stack(
            [w * self._loss_of(z, labels) for w, z in zip(weights, output.exit_logits, strict=True)]
        ).sum()

    def exits_and_heads(self) -> list[tuple[str, ExitHead | None]]:
        """Returns name and head of every exit, shallow to deep; the backbone's own classifier has no head."""
        return list(zip(self.exit_names, [*self.heads.active, None], strict=True))

    def _check_config_builds_it(self) -> None:
        check_config_builds(self, self._adapter)


# Where the signature of the class is asked for, it is that of __init__.
EarlyExitWrapper.__new__.__wrapped__ = EarlyExitWrapper.__init__  # type: ignore[attr-defined]
