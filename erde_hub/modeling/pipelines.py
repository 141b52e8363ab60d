"""Classification pipelines of transformers that take a threshold and say at which exit an answer was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.pipelines import (
    PIPELINE_REGISTRY,
    ImageClassificationPipeline,
    Pipeline,
    TextClassificationPipeline,
    ZeroShotClassificationPipeline,
)

from erde_hub.config import EarlyExitConfig
from erde_hub.errors import NotSupportedError


class EarlyExitPipeline(Pipeline):
    """What the classification pipelines of models with exits have in common.

    Importing ``erde_hub`` registers them, so that ``pipeline("image-classification", model=...)`` and
    ``pipeline("text-classification", model=...)`` make them for models with exits. For any other model the same calls
    make transformers' own pipelines.

    Args:
        threshold: For all calls, or in a call for that call: one number, or one per early exit; None takes the model's.
        **kwargs: As for transformers' pipeline of the task.

    Raises:
        ThresholdError: A threshold that the policy does not take.
        NotSupportedError: A threshold for a truncated model, which has no choice of exits.

    Example:
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> model = EarlyExitWrapper(timm.create_model("resnet8_cifar"), exits=["layer1"], input_size=(3, 32, 32))
        >>> processor = model.eval().image_processor()
        >>> classify = pipeline("image-classification", model=model, image_processor=processor, threshold=0.0)
        >>> image = Image.new("RGB", (32, 32))
        >>> [classify(image)[0]["exit_index"], classify(image, threshold=9.0)[0]["exit_index"]]
        [1, 0]
    """

    #: transformers' pipeline of the task, which any other model gets.
    plain: ClassVar[type[Pipeline]]

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Makes transformers' own pipeline for a model without exits."""
        if model is None or isinstance(getattr(model, "config", None), EarlyExitConfig):
            return super().__new__(cls)
        return cls.plain(model=model, *args, **kwargs)  # noqa: B026 - model comes first there too

    def _sanitize_parameters(
        self, threshold: float | Sequence[float] | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if threshold is not None:
            if not hasattr(self.model, "routing_plan"):
                raise NotSupportedError(
                    f"threshold={threshold!r}: {type(self.model).__name__} answers at one exit; a threshold needs the"
                    " model that it was cut from"
                )
            self.model.routing_plan(threshold)
            forward = {**forward, "threshold": threshold}
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: Any, **forward_params: Any) -> Any:
        return super()._forward({**model_inputs, **forward_params})

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """As transformers'; each answer also has ``exit_index``, 0 for the first exit."""
        answers = super().postprocess(model_outputs, **kwargs)
        if model_outputs.get("exit_index") is None:
            return answers
        taken = {"exit_index": int(model_outputs["exit_index"])}
        return {**answers, **taken} if isinstance(answers, dict) else [{**answer, **taken} for answer in answers]


class EarlyExitImageClassificationPipeline(EarlyExitPipeline, ImageClassificationPipeline):
    """transformers' ``image-classification`` with ``threshold=``, and ``exit_index`` in each answer."""

    plain = ImageClassificationPipeline


class EarlyExitTextClassificationPipeline(EarlyExitPipeline, TextClassificationPipeline):
    """transformers' ``text-classification`` with ``threshold=``, and ``exit_index`` in each answer."""

    plain = TextClassificationPipeline


class EarlyExitZeroShotClassificationPipeline(EarlyExitPipeline, ZeroShotClassificationPipeline):
    """transformers' ``zero-shot-classification``, which ignores arguments that it does not know: refuses a threshold.

    Raises:
        NotSupportedError: A threshold in the call.
    """

    plain = ZeroShotClassificationPipeline

    def _sanitize_parameters(
        self, threshold: float | Sequence[float] | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if threshold is not None:
            raise NotSupportedError(
                f"threshold={threshold!r}: zero-shot-classification takes none; load the model with it, or set"
                " pipe.model.threshold"
            )
        return super()._sanitize_parameters(**kwargs)

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """As transformers': one answer is made of several texts, which take exits of their own."""
        return ZeroShotClassificationPipeline.postprocess(self, model_outputs, **kwargs)


def register_pipelines() -> None:
    """Makes ``pipeline(task, model=...)`` give these pipelines to models with exits.

    A pipeline of the user's own that is registered for a task stays.
    """
    for task, kind in (
        ("image-classification", EarlyExitImageClassificationPipeline),
        ("text-classification", EarlyExitTextClassificationPipeline),
        ("zero-shot-classification", EarlyExitZeroShotClassificationPipeline),
    ):
        entry = PIPELINE_REGISTRY.supported_tasks[task]
        plain = kind.plain
        if entry["impl"] in (plain, f"{plain.__module__}.{plain.__qualname__}"):
            entry["impl"] = kind
