"""Trains a teacher, distils a student with exits from it, measures both, and writes a checkpoint.

    accelerate launch recipes/distill.py
    accelerate launch recipes/distill.py --config recipes/configs/cifar10_resnet18_resnet10.yaml --output_dir runs/a

Without --config the settings are those of recipes/configs/digits.yaml (a few minutes on two CPU cores, nothing is
downloaded), and with --dataset those of recipes/configs/own_images.yaml.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from erde_hub.scripts import common as recipe
from erde_hub.scripts.common.arguments import (
    DataArguments,
    ExitArguments,
    StudentArguments,
    TeacherArguments,
    build_loss,
    loss_arguments_class,
)
from erde_hub.scripts.common.command_line import base_config, describe_settings, parse_arguments, run_script
from erde_hub.training import DistillationArguments, create_accelerator, open_run_folder, run_on_main


def main() -> None:
    """Teacher, student, report; a run that is resumed skips what it has done."""
    started, base = time.perf_counter(), base_config()
    sections = {
        "data": DataArguments,
        "student": StudentArguments,
        "exits": ExitArguments,
        "teacher": TeacherArguments,
        "loss (in brackets the losses that take it, with their defaults)": loss_arguments_class(),
        "training of teacher and student": DistillationArguments,
    }
    data_args, student_args, exits, teacher_args, loss_args, args, config = parse_arguments(
        sections, __doc__, default_config=base
    )
    loss = build_loss(student_args.loss, loss_args, student_args.additions())
    accelerator = create_accelerator(args)
    recipe.configure_logging(accelerator.is_main_process)
    say = accelerator.print
    say(describe_settings(base))

    # Teacher, data, student. Whatever can be wrong is found here, before the run has a folder and time is spent.
    teacher = recipe.load_model(student_args.teacher) if student_args.teacher else None
    preprocessing = recipe.existing_preprocessing(teacher, teacher_args, student_args)
    if student_args.teacher:  # what a teacher was trained on is not reported on
        data = recipe.load_data_of(student_args.teacher, data_args, preprocessing, progress=accelerator.is_main_process)
    else:
        data = recipe.load_data(data_args, preprocessing, progress=accelerator.is_main_process)
    student = recipe.build_student(student_args, exits, data, args)
    plan = None  # of a teacher that is trained first
    if teacher is None and loss.reads_teacher:
        plan = recipe.TeacherPlan.build(teacher_args, exits, data, args)
        recipe.check_trainable(accelerator, plan.model, None, data, plan.loss, plan.args)
    recipe.check_trainable(accelerator, student, plan.model if plan else teacher, data, loss, args)

    name = recipe.run_name(config, base, data)
    folder = run_on_main(
        accelerator,
        lambda: open_run_folder(args.output_dir, name, resume=args.resume, overwrite=args.overwrite_output_dir),
    )
    args.output_dir = str(folder)
    settings = recipe.settings_dict(name, data_args, student_args, exits, teacher_args, loss_args, args)
    run = recipe.Run(accelerator, data, args, settings, started)
    say(f"{recipe.describe_data(data)}\nrun: {folder}{recipe.describe_load(accelerator.device)}")

    results = recipe.finished_before(run, folder)
    if results is None:
        known = teacher or (plan.model if plan else None)
        networks = {"student": student} if known is None else {"teacher": known, "student": student}
        say(f"\n{recipe.describe_networks(networks, loss)}")

        # Training: the Distiller's loop, from its newest checkpoint with --resume
        if plan is not None:
            say("\ntraining the teacher")
            teacher, _ = plan.train(run, folder / "teacher")
        static = None
        if student_args.train_static:
            say("\ntraining a static student: the student's network without exits, for comparison")
            static = recipe.train_static_student(run, recipe.build_student(student_args, exits, data, args))
        say("\ntraining the student")
        result = recipe.train_network(run, folder, student, loss, teacher)

        # Records of every exit, the threshold from those of validation, and the checkpoint with its report on test
        records = {split: recipe.collect(run, student, split) for split in ("validation", "test")}
        choice: Mapping[str, Any] = recipe.GIVEN_THRESHOLD
        if exits.threshold is None:
            choice = recipe.store_default_threshold(student, records["validation"])
        results = recipe.report(
            run, folder, student, (student_args.loss, loss), result, records, choice, teacher=teacher, static=static
        )
    say(f"\n{recipe.format_results(results)}\n\n{recipe.how_to_load(folder, data_args.dataset)}")


if __name__ == "__main__":
    run_script(main, resumable=True)
