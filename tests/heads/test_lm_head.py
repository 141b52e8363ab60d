"""Head ``lm``: the backbone's own read-out at every exit, stored once, with a norm and a correction where asked for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from erde_hub import EarlyExitWrapper, TruncatedModel
from erde_hub.errors import ConfigError, InputTypeError
from erde_hub.heads import FeatureSpec, create_head
from erde_hub.modeling import heads_only
from tests.fakes.transformers_models import CAUSAL, causal

pytestmark = pytest.mark.usefixtures("quiet_transformers")
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def every_exit(model) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(input_ids=IDS, output_all_exits=True).exit_logits


def stir(model: nn.Module) -> None:
    """Gives corrections, which begin as nothing, random weights."""
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)


@pytest.mark.parametrize("name", CAUSAL)
def test_an_exit_reads_out_as_a_model_that_ends_there(name):
    """The reference is the same model with fewer layers."""
    model = EarlyExitWrapper(causal(name), exits=2).eval()
    assert model.config.head == "lm"
    assert not list(model.heads.parameters())
    number = int(model.config.exits[1].rpartition(".")[2])
    shorter = causal(name, num_hidden_layers=number + 1)
    weights = model.backbone.state_dict()
    shorter.load_state_dict({key: weights[key] for key in shorter.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(every_exit(model)[1], shorter(input_ids=IDS).logits)
        assert torch.equal(every_exit(model)[2], model.backbone(input_ids=IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ()),
        ({"own_norm": True}, ("norm.weight",)),
        ({"own_norm": True, "rank": 3}, ("norm.weight", "down.weight", "up.weight")),
    ],
)
def test_checkpoints_hold_the_read_out_once(kwargs, names, tied, tmp_path, monkeypatch):
    model = EarlyExitWrapper(causal("llama", tie_word_embeddings=tied), exits=2, head_kwargs=kwargs).eval()
    stir(model)
    expected = every_exit(model)
    model.save_pretrained(tmp_path / "whole")
    own = {f"heads.{i}.{name}" for i in (0, 1) for name in names}
    stored = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert {name for name in stored if name.startswith("heads.")} == own
    assert ("backbone.lm_head.weight" in stored) is not tied
    again = EarlyExitWrapper.from_pretrained(tmp_path / "whole")
    assert all(map(torch.equal, every_exit(again), expected))
    with torch.no_grad():  # still one weight
        again.backbone.lm_head.weight.zero_()
    assert all(z.eq(0).all() for z in every_exit(again))

    model.backbone.save_pretrained(tmp_path / "published")
    monkeypatch.setattr(heads_only, "fetch", lambda *_: (tmp_path / "published" / "model.safetensors", "0" * 64))
    model.save_pretrained(tmp_path / "heads", heads_only=True, backbone_weights={"repo_id": "org/name"})
    assert set(load_file(tmp_path / "heads" / "model.safetensors")) == own
    assert all(map(torch.equal, every_exit(EarlyExitWrapper.from_pretrained(tmp_path / "heads")), expected))


def test_copies_and_cut_models_have_a_read_out_of_their_own(tmp_path):
    backbone = causal("gemma2", tie_word_embeddings=False)
    model = EarlyExitWrapper(backbone, exits=2, head_kwargs={"own_norm": True, "rank": 2}).eval()
    stir(model)
    expected = every_exit(model)
    cut = model.truncate(0)
    cut.save_pretrained(tmp_path)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        assert torch.equal(cut(input_ids=IDS).logits, expected[0])
        assert torch.equal(TruncatedModel.from_pretrained(tmp_path)(input_ids=IDS).logits, expected[0])
        model.backbone.lm_head.weight.zero_()
        assert torch.equal(cut(input_ids=IDS).logits, expected[0])
    assert all(map(torch.equal, every_exit(copies[0]), expected))
    assert all(map(torch.equal, every_exit(copies[1]), expected))
    model.backbone.lm_head = nn.Linear(16, 50, bias=False)
    assert not every_exit(model)[0].eq(0).all(), "a new output embedding is the exits' as well"


def test_the_exit_table_counts_what_is_shared():
    model = EarlyExitWrapper(causal("llama", tie_word_embeddings=True), exits=["model.layers.1"])
    rows = model.exit_table(input_size=(1,))
    embedding, layer = 50 * 16, sum(p.numel() for p in model.backbone.model.layers[0].parameters())
    assert rows[0].cumulative_params == 2 * layer + 16 + embedding
    assert rows[1].cumulative_params == sum(p.numel() for p in model.parameters()) == 5 * layer + 16 + embedding
    assert rows[0].macs == pytest.approx(2 / 5 * (rows[1].cumulative_macs - 2 * embedding) + embedding, rel=0.02)


def test_training_reaches_the_shared_weights_from_every_exit():
    model = EarlyExitWrapper(causal("qwen2"), exits=2, exit_weights=[1, 0, 0], head_kwargs={"rank": 2}).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.backbone.lm_head.weight.grad.abs().sum() > 0
    assert model.heads[0].up.weight.grad.abs().sum() > 0
    assert model.backbone.model.layers[4].mlp.up_proj.weight.grad.abs().sum() == 0


def test_other_types_and_devices():
    model = EarlyExitWrapper(causal("gpt_neox").bfloat16(), exits=1, head_kwargs={"own_norm": True, "rank": 2})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert every_exit(model.eval().double())[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"own_norm": 1}, "own_norm must be True or False"), ({"rank": -1}, "rank must be"), ({"rank": True}, "got True")],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        EarlyExitWrapper(causal("llama"), exits=1, head_kwargs=kwargs)


def test_backbones_that_it_does_not_fit():
    with pytest.raises(ConfigError, match="belongs to a backbone"):
        create_head("lm", FeatureSpec(16, "NLC", (), "none"), 50)(torch.zeros(1, 1, 16))
    no_norm = {"do_layer_norm_before": False}
    assert every_exit(EarlyExitWrapper(causal("opt", **no_norm), exits=1).eval())[0].isfinite().all()
    with pytest.raises(ConfigError, match="OPTForCausalLM has no final norm: leave it out"):
        EarlyExitWrapper(causal("opt", **no_norm), exits=1, head_kwargs={"own_norm": True})
    with pytest.raises(InputTypeError, match="does more after its last layer than its final norm"):
        EarlyExitWrapper(causal("opt", word_embed_proj_dim=8), exits=1)
