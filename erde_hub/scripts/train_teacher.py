"""Trains a teacher with exits, the first half of a distillation, and writes a checkpoint.

    accelerate launch recipes/train_teacher.py
    accelerate launch recipes/train_teacher.py --config recipes/configs/cifar10_resnet18_resnet10.yaml

It reads the same files as distill.py, with what `teacher_training` changes for the teacher; pass the folder that it
writes to `distill.py --teacher`. Without --config the settings are those of recipes/configs/digits.yaml, and with
--dataset those of recipes/configs/own_images.yaml.
"""

from __future__ import annotations

import time

from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    TeacherArguments,
    loss_arguments_class,
)
from erde_hub.scripts.common.command_line import base_config, describe_settings, parse_arguments, run_script
from erde_hub.training import DistillationArguments, create_accelerator, open_run_folder, run_on_main


def main() -> None:
    """Trains, measures and reports; a run that is resumed skips what it has done."""
    started, base = time.perf_counter(), base_config()
    sections = {
        "data": DataArguments,
        "teacher": TeacherArguments,
        "exits": ExitArguments,
        "training": DistillationArguments,
    }
    data_args, teacher_args, exits, args, config = parse_arguments(
        sections,
        __doc__,
        default_config=base,
        promote="teacher_training",
        ignored=[StudentArguments, loss_arguments_class()],
    )
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    say = accelerator.print
    say(describe_settings(base))

    # Whatever can be wrong is found here, before the run has a folder and time is spent.
    preprocessing = recipe.existing_preprocessing(None, teacher_args)
    data = recipe.load_data(data_args, preprocessing, progress=accelerator.is_main_process)
    plan = recipe.TeacherPlan.build(teacher_args, exits, data, args)
    recipe.check_trainable(accelerator, plan.model, None, data, plan.loss, plan.args)

    name = f"{recipe.run_name(config, base, data)}-teacher"
    folder = run_on_main(
        accelerator,
        lambda: open_run_folder(args.output_dir, name, resume=args.resume, overwrite=args.overwrite_output_dir),
    )
    args.output_dir = plan.args.output_dir = str(folder)
    settings = recipe.settings_dict(name, data_args, teacher_args, exits, args)
    run = recipe.Run(accelerator, data, args, settings, started)
    say(f"{recipe.describe_data(data)}\nrun: {folder}{recipe.describe_load(accelerator.device)}")
    say(f"\n{recipe.describe_networks({'teacher': plan.model})}")
    _, results = plan.train(run, folder)
    say(f"\n{recipe.format_results(results)}\n\n{recipe.how_to_load(folder, data_args.dataset)}")


if __name__ == "__main__":
    run_script(main, resumable=True)
