"""Models with exits under the Trainer of transformers, and under PEFT."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BitImageProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.losses import create_loss, list_losses
from erde_hub.training import EarlyExitTrainer, all_exits_loss
from tests.fakes import transformers_models
from tests.fakes.networks import resnet8
from tests.fakes.texts import make_tokenizer
from tests.fakes.training import CLASSES, assert_same, network, weights


def rows(count=24, side=8, seed=0):
    """Images whose classes are colours, as any map-style data set."""
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(count), torch.arange(count) % 3] += 1.5
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]


def settings(folder, **changes):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "learning_rate": 0.01,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **changes})


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class LastExitAlone(Trainer):
    """A loss of one's own, as people write it for models without exits."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(output.logits, inputs["labels"], weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, output) if return_outputs else loss


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("trainer", "arguments", "options", "learns"),
    [
        (LastExitAlone, {}, {}, False),
        (Trainer, {"label_smoothing_factor": 0.1}, {}, False),
        (Trainer, {}, {}, True),
        (Trainer, {}, {"compute_loss_func": all_exits_loss(WEIGHTED)}, True),
        (EarlyExitTrainer, {"label_smoothing_factor": 0.1}, {}, True),
    ],
)
def test_exits_learn_or_it_is_said_that_they_do_not(tmp_path, caplog, trainer, arguments, options, learns):
    model = network()
    before = weights(model.heads)
    trainer(model, settings(tmp_path, **arguments), train_dataset=rows(), **options).train()
    said = [record.message for record in caplog.records if "early exits learn nothing" in record.message]
    changed = [not torch.equal(before[name], value) for name, value in model.heads.named_parameters()]
    assert changed == [learns] * len(changed)
    assert len(said) == (not learns)


def test_frozen_heads_are_told_once_and_only_where_the_backbone_learns(caplog):
    model, images = network(), torch.randn(4, 3, 8, 8)
    model.heads.requires_grad_(False)
    model.train()
    for _ in range(3):
        model(images, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert caplog.text.count("heads of the early exits are frozen") == 1
    caplog.clear()
    model = network()
    model.requires_grad_(False).train()(images)
    model.eval()(images)
    with torch.no_grad():
        network().train()(images)
    assert not caplog.text


def test_the_loss_over_all_exits_is_the_weighted_sum_and_a_mean_over_accumulated_batches():
    model, batch = network().train(), torch.utils.data.default_collate(rows(6))
    output = model(batch["pixel_values"])
    expected = sum(w * WEIGHTED(z, batch["labels"]) for w, z in zip([0.5, 1.0, 2.0], output.exit_logits, strict=True))
    compute = all_exits_loss(WEIGHTED, exit_weights=[0.5, 1.0, 2.0])
    torch.testing.assert_close(compute(output, batch["labels"]), expected)
    torch.testing.assert_close(compute(output, batch["labels"], num_items_in_batch=24), expected / 4)
    routed = model.eval()(batch["pixel_values"])
    torch.testing.assert_close(compute(routed, batch["labels"]), WEIGHTED(routed.logits, batch["labels"]))
    with pytest.raises(ConfigError, match="exit_weights"):
        all_exits_loss(exit_weights=[1.0])(output, batch["labels"])


@pytest.mark.parametrize("kind", [Trainer, EarlyExitTrainer])
def test_accumulated_steps_are_one_step_with_the_whole_batch(tmp_path, kind):
    trained = []
    for batch, steps in ((8, 1), (4, 2)):
        model = network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.eval()
                module.train = lambda mode=True, module=module: module
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        options = {"compute_loss_func": all_exits_loss()}
        if kind is EarlyExitTrainer:
            options = {"loss": "feature_kd", "teacher": network(6, seed=7)}
        arguments = settings(
            tmp_path, max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, optim="sgd"
        )
        trainer = kind(model, arguments, train_dataset=rows(16), **options)
        trainer.train()
        parameters = [*model.parameters(), *getattr(trainer, "loss", nn.Module()).parameters()]
        trained.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


class Killed(TrainerCallback):
    """Stops the process's training in the middle of a step, as a kill does."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["image", "bert"])
def test_what_the_trainer_saves_loads_without_a_warning(name, tmp_path, caplog):
    """It writes use_cache and the tokenizer's special tokens into the config."""
    model, data, tokenizer = network(), rows(8), None
    if name == "bert":
        model, columns, tokenizer = transformers_models.wrap(name), transformers_models.inputs(name), make_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
        data = [{**{key: own[row] for key, own in columns.items()}, "labels": row % 3} for row in range(8)]
    auto = AutoModelForImageClassification if tokenizer is None else AutoModelForSequenceClassification
    saving = settings(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, saving, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    stored = json.loads((tmp_path / "final" / "config.json").read_text())
    assert {"use_cache", *(["pad_token_id", "bos_token_id"] if name == "bert" else [])} <= stored.keys()
    caplog.clear()
    for folder in ("final", "checkpoint-1"):
        EarlyExitWrapper.from_pretrained(tmp_path / folder)
        auto.from_pretrained(tmp_path / folder)
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def trainer_of(name, kind, folder, **options):
    torch.manual_seed(0)
    model = network() if name == "resnet" else transformers_models.wrap(name)
    if kind is EarlyExitTrainer:
        teacher = transformers_models.wrap(name, policy="never") if name == "vit" else network(seed=7)
        options |= {"loss": "erde" if name == "vit" else "feature_kd", "teacher": teacher}
    data = rows(24, model.config.input_size[1])
    arguments = settings(
        folder, save_strategy="steps", save_steps=2, save_total_limit=1, metric_for_best_model="accuracy"
    )
    return kind(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy, **options)


@pytest.mark.parametrize("kind", [Trainer, EarlyExitTrainer])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_from_start_over_a_kill_to_the_resumed_end(tmp_path, name, kind, caplog):
    never_stopped = trainer_of(name, kind, tmp_path / "whole")
    never_stopped.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(name, kind, tmp_path / "run", callbacks=[Killed()]).train()
    torch.manual_seed(99)
    resumed = trainer_of(name, kind, tmp_path / "run")
    for parameter in resumed.model.parameters():
        parameter.data.uniform_()  # all of them have to come out of the checkpoint
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(weights(never_stopped.model), weights(resumed.model))

    metrics, predictions = resumed.evaluate(), resumed.predict(resumed.eval_dataset).predictions
    if kind is EarlyExitTrainer:
        assert {f"eval_{exit_}_accuracy" for exit_ in resumed.model.exit_names} < metrics.keys()
        assert [logits.shape for logits in predictions] == [(24, resumed.model.config.num_labels)] * 3
    else:
        images = torch.stack([row["pixel_values"] for row in resumed.eval_dataset])
        routed = resumed.model.eval()(images)
        np.testing.assert_allclose(predictions, routed.logits.detach(), rtol=1e-4, atol=1e-5)
        labels = torch.arange(24) % 3
        assert metrics["eval_accuracy"] == pytest.approx((routed.logits.argmax(1) == labels).double().mean().item())

    resumed.save_model(str(tmp_path / "model"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = EarlyExitWrapper.from_pretrained(tmp_path / "model")
    assert not [record.message for record in caplog.records]
    assert_same(weights(resumed.model), weights(loaded))


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2", "swin", "resnet"])
def test_a_checkpoint_loads_by_load_state_dict_too(tmp_path, name):
    """As the Trainer does, without looking at what found no place."""
    model, other = transformers_models.wrap(name), transformers_models.wrap(name)
    model.save_pretrained(tmp_path)
    for tensor in other.parameters():
        tensor.data.uniform_()
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same(weights(model), weights(other))


def test_metrics_per_exit_terms_and_the_loss_are_those_computed_by_hand(tmp_path):
    model, teacher, data = network(), network(seed=7), rows()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    arguments = settings(
        tmp_path, max_steps=1, per_device_train_batch_size=24, logging_strategy="steps", logging_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = EarlyExitTrainer(model, arguments, loss="erde", teacher=teacher, train_dataset=data, eval_dataset=data)
    batch = torch.utils.data.default_collate(data)
    expected = create_loss("erde")(
        model.train()(batch["pixel_values"]).exit_logits,
        teacher.eval()(batch["pixel_values"], output_all_exits=True).exit_logits,
        batch["labels"],
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.loss.item(), rel=1e-3)
    for name, value in expected.terms.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-3)

    output = model.eval()(batch["pixel_values"], labels=batch["labels"], output_all_exits=True)
    metrics = trainer.evaluate()
    for name, logits in zip(model.exit_names, output.exit_logits, strict=True):
        right = (logits.argmax(1) == batch["labels"]).double().mean().item()
        assert metrics[f"eval_{name}_accuracy"] == pytest.approx(right)
    assert metrics["eval_accuracy"] == metrics["eval_classifier_accuracy"]
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [key for key in list_losses() if key not in ("dedier", "egad", "mse")])
def test_every_loss_of_the_table_over_classes_trains(loss, tmp_path):
    student, teacher = network(4), network(6, seed=1) if create_loss(loss).reads_teacher else None
    before = weights(student.heads)
    trainer = EarlyExitTrainer(
        student, settings(tmp_path, max_steps=2), loss=loss, teacher=teacher, train_dataset=rows()
    )
    own = weights(trainer.loss)
    trainer.train()
    assert len(own) == (2 if loss == "feature_kd" else 0)
    for old, new in ((before, weights(student.heads)), (own, weights(trainer.loss))):
        assert not any(torch.equal(old[name], new[name]) for name in old if "num_batches" not in name)


def test_classes_and_preprocessing_of_the_training_set_are_taken(tmp_path):
    features = Features({"pixel_values": Sequence(Value("float32")), "label": ClassLabel(names=CLASSES)})
    data = Dataset.from_dict({"pixel_values": [[0.0]], "label": [1]}, features=features)
    processor = BitImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]
    )
    model = resnet8(3, 4, 8, ("layer1",))
    EarlyExitTrainer(model, settings(tmp_path), train_dataset=data, processing_class=processor)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.preprocessing["mean"] == [0.1, 0.2, 0.3]
    model.config.id2label = {0: "blue", 1: "green", 2: "red"}
    with pytest.raises(ConfigError, match="build it for these classes"):
        EarlyExitTrainer(model, settings(tmp_path), train_dataset=data)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "erde"}, ConfigError, "pass teacher="),
        ({"loss": "ce", "teacher": network()}, ConfigError, "does not use a teacher"),
        ({"loss": "dedier", "teacher": network()}, ConfigError, "whole training set.*Distiller"),
        ({"loss": "egad", "teacher": network()}, ConfigError, "language models"),
        ({"loss": "mse"}, ConfigError, "is for regression"),
        ({"compute_loss_func": all_exits_loss()}, ConfigError, "leave it out"),
        ({"model": nn.Linear(2, 2)}, InputTypeError, "wrap it"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        EarlyExitTrainer(**{"model": network(), "args": settings(tmp_path), "train_dataset": rows(), **options})


def test_lora_trains_saves_and_merges_the_heads(tmp_path, caplog):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    images, labels = torch.stack([row["pixel_values"] for row in rows(24, 32)]), torch.arange(24) % 3

    def adapted(**options):
        torch.manual_seed(0)
        model = transformers_models.wrap("vit")
        size = model.config.input_size[1]
        return model, images[:, :, :size, :size], peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)

    wrapped, pixels, config = adapted(modules_to_save=["heads"])
    model = peft.get_peft_model(wrapped, config)
    before = weights(wrapped.heads.active)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
    EarlyExitTrainer(model, settings(tmp_path), train_dataset=data, eval_dataset=data).train()
    assert not caplog.text
    after = weights(wrapped.heads.active)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    trained = model.eval()(pixel_values=pixels, output_all_exits=True).exit_logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(adapted()[0], tmp_path / "adapter").eval()
    for logits, own in zip(loaded(pixel_values=pixels, output_all_exits=True).exit_logits, trained, strict=True):
        assert torch.equal(logits, own)
    with loaded.disable_adapter():
        plain = adapted()[0].eval()(pixels, output_all_exits=True).exit_logits
        assert torch.equal(loaded(pixel_values=pixels, output_all_exits=True).exit_logits[0], plain[0])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = EarlyExitWrapper.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(pixels, output_all_exits=True).exit_logits, trained, rtol=1e-4, atol=1e-4)

    wrapped, pixels, config = adapted()
    peft.get_peft_model(wrapped, config).train()(pixel_values=pixels)
    assert "modules_to_save=['heads']" in caplog.text
