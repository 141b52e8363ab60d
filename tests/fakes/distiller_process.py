"""What the tests of several and of killed processes run: ``distiller_process.py MODE FOLDER``."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from erde_hub import EarlyExitWrapper
from erde_hub.data import load_token_data
from erde_hub.data.images import load_image_data
from erde_hub.errors import NonFiniteLossError
from erde_hub.losses import CELoss, FeatureTerm, LossResult, ReadoutWeight, create_loss
from erde_hub.training import DistillationArguments, Distiller, DistillerCallback, create_accelerator, readout


def digits():
    return load_image_data("digits", max_train_samples=640)


def network(name="resnet8_cifar", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = timm.create_model(name, num_classes=10, width=8)
        return EarlyExitWrapper(
            backbone, exits=["layer1", "layer2"], input_size=(3, 32, 32), backbone_kwargs={"width": 8}
        )


def run_args(folder, **changes):
    settings = {
        "epochs": 2, "batch_size": 32, "gradient_accumulation_steps": 2, "ema_decay": 0.95, "lr": 0.1,
        "checkpoint_steps": 3, "cpu_threads": 1, "progress_bar": False, "seed": 7, "mixed_precision": "no",
        "output_dir": None if folder is None else str(folder),
    }  # fmt: skip
    return DistillationArguments(**{**settings, **changes})


class Report(DistillerCallback):
    """Says which step is done, so that the test knows when to strike."""

    def on_step_end(self, distiller):
        sys.stdout.write(f"step {distiller.position.step}\n")
        sys.stdout.flush()


def train(folder, callbacks=(), **changes):
    student = network()
    return student, Distiller(
        student, digits(), run_args(folder, **changes), "erde", network(seed=1), callbacks=callbacks
    ).train()


def quiet_layers(model: nn.Module) -> None:
    """Batch norm and dropout in eval mode, everything else as in training."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()


def images():
    """Student, data, loss and teacher."""
    return network(), digits(), "erde", trained_a_little()


def llama(layers, seed):
    """A language model of 50 words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 16}
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, eos_token_id=None, **sizes))


def texts():
    """The same of language models; EGAD takes its means over the tokens of all processes."""
    ids = np.random.default_rng(0).integers(3, 50, 40 * 16)
    data = load_token_data({"train": ids, "validation": ids[:96], "test": ids[:96]}, vocab_size=50, block_size=16)
    return EarlyExitWrapper(llama(3, 0), exits=["model.layers.0"]), data, "egad", llama(2, 1)


def one_step(batch_size, accelerator=None, parts=images):
    """Loss, terms and gradients of the first global batch, averaged over the processes."""
    args = run_args(None, batch_size=batch_size, gradient_accumulation_steps=1, augment="none")
    student, data, loss, teacher = parts()
    distiller = Distiller(student, data, args, loss, teacher, accelerator=accelerator)
    with distiller._prepared() as wrapped:
        quiet_layers(student)
        batch = next(iter(distiller.train_loader))
        result, _ = distiller.training_step(wrapped, batch)
        values = torch.stack([result.loss.detach(), *result.terms.values()])
        values = distiller.accelerator.reduce(values, "mean")
        gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    return dict(zip(["loss", *result.terms], values.tolist(), strict=True)), gradients


def trained_a_little():
    """A teacher that is right on some samples and wrong on others, so that every mask of the loss is at work."""
    teacher = network(seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
        train_split = digits().train
        pixels = torch.from_numpy(train_split.pixels(torch.arange(256).numpy())).permute(0, 3, 1, 2).float() / 255
        quiet_layers(teacher)
        for _ in range(12):
            logits = teacher(pixels - 0.5).exit_logits
            sum(nn.functional.cross_entropy(z, train_split.labels[:256]) for z in logits).backward()
            optimizer.step()
            optimizer.zero_grad()
    return teacher


class BreaksOnRankOne(CELoss):
    calls = 0

    def forward(self, *args):
        result = super().forward(*args)
        self.calls += 1
        if self.calls < 3 or int(os.environ["RANK"]) != 1:
            return result
        return LossResult(result.loss * float("nan"), result.terms, {"ce": result.exit_terms["ce"] * float("nan")})


class StopsRankOne(DistillerCallback):
    def on_step_end(self, distiller):
        if distiller.accelerator.process_index == 1 and distiller.position.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def digest(tensors) -> list[float]:
    """One number per tensor that shows a difference between two processes."""
    return [float(tensor.detach().double().abs().sum()) for tensor in tensors]


def readout_round(accelerator) -> dict[str, list[float]]:
    """What is to be equal in all processes where a loss has a table, a trained head and projections, under EMA."""
    found, heads = {}, []
    new, readout.new_readout = readout.new_readout, lambda *given: heads.append(new(*given)) or heads[-1]
    student, weight = network(), ReadoutWeight(readout_source="head", readout_lr=0.01, readout_confidence="laplace")
    loss = create_loss("kd").add(weight, FeatureTerm())
    data = load_image_data("digits", max_train_samples=150, max_eval_samples=40)
    args = run_args(None, gradient_accumulation_steps=1, checkpoint_steps=0)
    update = weight.update

    def note(*given):
        found["statistics of the student that is read"] = digest(student.buffers())
        found["head"] = digest([*heads[0].parameters(), *heads[0].buffers()])
        return update(*given)

    weight.update = note
    Distiller(student, data, args, loss, network(seed=1), accelerator=accelerator).train()
    readout.new_readout = new
    found["table"] = weight.table.tolist()
    found["projections"] = digest(loss.parameters())
    found["student"] = digest(student.state_dict().values())
    return found


def group(folder: Path) -> None:
    """All that is to hold for several processes, in one start of them."""
    accelerator = create_accelerator(run_args(None))
    rank = accelerator.process_index
    report = {"rank": rank, "processes": accelerator.num_processes, "threads": torch.get_num_threads()}
    report["values"], gradients = one_step(64, accelerator)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    settings = {"max_steps": 7, "gradient_accumulation_steps": 1, "ema_decay": 0.9}
    expected, whole = train(None, **settings)
    _, result = train(folder / f"run{rank}", [StopsRankOne()], **settings)
    report["stopped"] = [result.status, result.step, (folder / f"run{rank}").exists()]
    # each rank named another folder, as machines without a shared disk do; to resume, all need the one that is there
    student, result = train(folder / "run0", **settings, resume=True)
    report["resumed"] = [result.status, result.step]
    report["same"] = all(
        torch.equal(a, b) for a, b in zip(expected.state_dict().values(), student.state_dict().values(), strict=True)
    )
    report["history"] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in whole.history]
    report["weights"] = digest(student.parameters())
    report["round"] = readout_round(accelerator)
    try:
        Distiller(network(), digits(), run_args(None, gradient_accumulation_steps=1), BreaksOnRankOne()).train()
    except NonFiniteLossError as error:
        report["error"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def group_of_texts(folder: Path) -> None:
    """A step of two processes and a short training of language models."""
    accelerator = create_accelerator(run_args(None))
    rank = accelerator.process_index
    values, gradients = one_step(4, accelerator, texts)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    student, data, loss, teacher = texts()
    args = run_args(None, batch_size=4, gradient_accumulation_steps=1, lr=0.01, checkpoint_steps=0)
    result = Distiller(student, data, args, loss, teacher, accelerator=accelerator).train()
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history]
    report = {"values": values, "history": history, "weights": digest(student.parameters()), "steps": result.step}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    gc.freeze()  # each training ends with a collection of garbage
    mode, target = sys.argv[1], Path(sys.argv[2])
    if mode == "train":
        train(target, [Report()])
    elif mode == "resume":
        train(target, [Report()], resume=True)
    elif mode == "group":
        group(target)
    elif mode == "texts":
        group_of_texts(target)
    elif mode == "check":
        create_accelerator(run_args(target))
        target.mkdir()
