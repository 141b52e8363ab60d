"""What the Distiller hands to a loss beside logits: numbers of samples, features of exits, and its own parameters."""

import pytest
import torch

from erde_hub.errors import ConfigError
from erde_hub.losses import CELoss, EntropyWeight, ERDELoss, ExitLoss, FeatureKDLoss, FeatureTerm, Term, create_loss
from erde_hub.scripts.common.arguments import StudentArguments, build_loss, loss_arguments_class
from erde_hub.training import Distiller, ExitFeatures
from erde_hub.training._loss_inputs import LossInputs
from tests.fakes.training import TinyExits, assert_same, make_args, make_data, network, weights


@pytest.fixture(scope="module")
def data():
    return make_data(rows=48)


def test_the_loss_gets_the_number_of_each_sample(data):
    seen = []

    class Numbers(ExitLoss):
        needs_teacher, needs_index = False, True

        def terms(self, batch):
            seen.append((batch.index.clone(), batch.labels.clone()))
            return [Term("ce", batch.student_logits.square().mean(-1), 1.0)]

    Distiller(TinyExits(), data, make_args(epochs=1), Numbers()).train()
    index = torch.cat([numbers for numbers, _ in seen])
    labels = torch.cat([classes for _, classes in seen])
    assert set(index.tolist()) <= set(data.train.indices.tolist())
    assert len(set(index.tolist())) == len(index)
    position = {row: place for place, row in enumerate(data.train.indices.tolist())}
    assert labels.tolist() == [int(data.train.labels[position[row]]) for row in index.tolist()]


def test_features_reach_the_loss_and_its_projection_learns(data):
    student, teacher = network(4), network(6, seed=1)
    before = weights(teacher)
    loss = FeatureKDLoss(feature_weight=1.0)
    distiller = Distiller(student, data, make_args(epochs=1), loss, teacher)
    layers = loss.extra_terms[0].projections
    assert {name: (layer.in_features, layer.out_features) for name, layer in layers.items()} == {
        "0": (4, 6),
        "1": (8, 12),
    }
    initial = weights(loss)
    result = distiller.train()
    assert result.history[-1]["train"]["terms"]["feature"] > 0
    assert any(not torch.equal(initial[name], value) for name, value in weights(loss).items())
    assert_same(weights(teacher), before)
    # The projection is the loss's: the student has the keys that it had, and no hooks stay behind.
    assert weights(student).keys() == weights(network(4)).keys()
    assert not any(head._forward_pre_hooks for model in (student, teacher) for head in model.heads)


def test_features_are_what_the_heads_read_channels_last():
    model, images, read = network(4), torch.randn(2, 3, 8, 8), []
    model.heads[1].register_forward_hook(lambda _, args, __: read.append(args[0]))
    features = ExitFeatures(model)
    assert features.widths == [4, 8, None]
    with features.watching():
        model.train()(images)
        taken = features.take()
        assert taken[0].shape[-1] == 4
        assert torch.equal(taken[1], read[0].permute(0, 2, 3, 1))
        assert taken[1].requires_grad
        assert taken[2] is None
        assert features.take() == [None, None, None], "what was taken is let go of"
        model(images)
        assert torch.equal(features.take(channels_last=False)[1], read[1])
    with pytest.raises(ConfigError, match=r"within watching\(\) only"):
        features.take()
    assert not any(head._forward_pre_hooks for head in model.heads)
    with pytest.raises(ConfigError, match="Linear has no early exits whose features could be read"):
        ExitFeatures(torch.nn.Linear(2, 2))


def test_a_projection_is_saved_and_resumed_bit_for_bit(data, tmp_path):
    def run(folder, **changes):
        student, loss = network(4), create_loss("erde").add(FeatureTerm(), EntropyWeight())
        args = make_args(epochs=2, output_dir=None if folder is None else str(folder), **changes)
        return student, loss, Distiller(student, data, args, loss, network(6, seed=1))

    whole_student, whole_loss, distiller = run(None)
    distiller.train()

    class Stop(Exception):  # noqa: N818
        pass

    student, loss, distiller = run(tmp_path / "run", checkpoint_steps=1)
    save, count = distiller._save, []

    def save_and_stop():
        save()
        count.append(1)
        if len(count) == 3:
            raise Stop

    distiller._save = save_and_stop
    with pytest.raises(Stop):
        distiller.train()
    student, loss, distiller = run(tmp_path / "run", checkpoint_steps=1, resume=True)
    distiller.train()
    assert_same(weights(student), weights(whole_student))
    assert_same(weights(loss), weights(whole_loss))


def test_what_does_not_go_together_is_refused_before_training(data):
    with pytest.raises(ConfigError, match="TinyExits has no early exits whose features could be read"):
        Distiller(TinyExits(), data, make_args(), FeatureKDLoss(), TinyExits(seed=1))
    with pytest.raises(ConfigError, match="'self' teaches the earlier exits"):
        Distiller(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), data, make_args(), "self")
    with pytest.raises(ConfigError, match="ERDELoss learns from a teacher and there is none"):
        Distiller(TinyExits(), data, make_args(), ERDELoss().add(EntropyWeight()))


def built(loss, additions=(), **flags):
    arguments = loss_arguments_class()()
    for key, value in flags.items():
        assert hasattr(arguments, key), key
        setattr(arguments, key, value)
    return build_loss(loss, arguments, additions)


def test_flags_reach_the_loss_or_what_joins_it():
    student = StudentArguments(loss="erde", sample_weight="ea_kd", extra_terms=["self"])
    loss = built("erde", student.additions(), temperature=3.0, entropy_temperature=2.0, self_weight=0.5)
    assert (loss.temperature, loss.entropy_weight) == (3.0, 0.005)
    assert loss.added()["ea_kd"]["entropy_temperature"] == 2.0
    assert loss.added()["self"]["self_weight"] == 0.5
    assert built("ea_kd", entropy_temperature=2.0).entropy_temperature == 2.0


@pytest.mark.parametrize(
    ("student", "flags", "message"),
    [
        ({"loss": "ce", "sample_weight": "ea_kd"}, {}, "'ea_kd' weighs the samples .* CELoss has none"),
        ({"loss": "ea_kd", "sample_weight": "ea_kd"}, {}, "EAKDLoss has 'ea_kd' already"),
        ({"loss": "self", "extra_terms": ["feature"]}, {}, "'feature' reads the teacher's answers"),
        ({"loss": "kd"}, {"entropy_temperature": 2.0}, "loss 'kd' has no argument 'entropy_temperature'"),
        ({"loss": "kd", "sample_weight": "ea"}, {}, "unknown sample_weight 'ea'.*did you mean 'ea_kd'"),
        ({"loss": "kd", "readout": "ea_kd"}, {}, "readout does not take 'ea_kd': give it as sample_weight"),
        ({"loss": "kd", "sample_weight": "feature"}, {}, "does not take 'feature': give it as extra_terms"),
        ({"loss": "kd", "extra_terms": ["features"]}, {}, "unknown extra_terms 'features'.*did you mean 'feature'"),
    ],
)
def test_flags_that_do_not_go_together(student, flags, message):
    student = StudentArguments(**student)
    with pytest.raises(ConfigError, match=message):
        built(student.loss, student.additions(), **flags)


def test_a_loss_of_ones_own_that_takes_logits_only_is_called_with_logits_only(data):
    class Plain(CELoss):
        def forward(self, student_logits, teacher_logits, labels):
            return super().forward(student_logits, teacher_logits, labels)

    assert Distiller(TinyExits(), data, make_args(epochs=1), Plain()).train().step > 0


def test_gradients_of_the_loss_are_averaged_over_the_processes(data):
    class Two:
        num_processes = 2

        def reduce(self, tensor, how):
            assert how == "mean"
            return tensor + 1

    loss = FeatureKDLoss()
    loss.extra_terms[0].build([2, None], [3, None])
    weight = loss.extra_terms[0].projections["0"].weight
    weight.grad = torch.zeros_like(weight)
    LossInputs(loss, network(4), None, None, 0).average_gradients(Two())
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_loss_of_language_models_is_not_for_images(data):
    with pytest.raises(ConfigError, match="EGADLoss is for causal language models, not for classification"):
        Distiller(TinyExits(), data, make_args(), "egad", TinyExits(seed=1))


def test_weights_and_readouts_by_flags_train_together(data):
    student = StudentArguments(loss="erde", sample_weight="ea_kd", readout="dedier")
    loss = built("erde", student.additions(), readout_beta=1.0, entropy_temperature=2.0)
    assert loss.added()["dedier"]["readout_beta"] == 1.0
    result = Distiller(TinyExits(), data, make_args(epochs=2), loss, TinyExits(seed=1)).train()
    assert {"ea_kd_weight", "dedier_weight", "entropy"} <= set(result.history[-1]["train"]["terms"])
    assert "readout" in result.history[0]
