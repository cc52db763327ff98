"""A teacher of CIFAR-10, its student, and how they compare, in the minutes that are left. A part of `gpu.py`."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

from gpu_job import Figures, Job

from distmatch.commands import classifier, teach
from distmatch.commands.train import train
from distmatch.data.images import load_images
from distmatch.evaluation.measure import Space, evaluate
from distmatch.evaluation.spaces import find_spaces
from distmatch.models.folder import load_model
from distmatch.pipeline import DistilledPipeline, Pipeline, TeacherPipeline
from distmatch.system.files import write_json
from distmatch.system.plain import read_json

TEACHER_SHARE, STUDENT_SHARE = 0.5, 0.25
"""Of the time left. Pairs and figures take the rest."""

STUDENT_STEP = 4.0
"""Teacher steps that a student's step takes: 11 passes of 128 images against 3, and what is around them."""

CHECKPOINTS = 5


def cifar10(job: Job) -> None:
    """Feature spaces, teacher, pairs, student; each goes on where an earlier call was stopped."""
    if job.cifar is None:
        job.results.row(job.name, "all", {"targets": {}, "figures": {"": "left out: give --cifar FILE"}})
        return
    run = Run(job, job.cifar)
    for row, work in {
        "feature spaces": run.train_spaces,
        "speed of the teacher's steps": run.probe,
        "teacher": run.train_teacher,
        "teacher's figures": run.teachers_figures,
        "student": run.train_student,
        "student's figures": run.students_figures,
        "student / teacher": run.ratios,
    }.items():
        if not job.measure(row, work):
            return


class Run:
    def __init__(self, job: Job, file: Path):
        self.job, self.file, self.folder = job, file, job.work / "cifar10"
        tiny = job.tiny
        self.images = 128 if tiny else 5_000  # to measure
        self.network: dict[str, Any] = {"widths": (8, 16) if tiny else (128, 256, 256), "batch": 4 if tiny else 128}

    def train_spaces(self) -> Figures:
        """They keep a CPU busy for minutes; WORK/cifar10/spaces may be made before, by `distmatch classifier`."""
        out = self.folder / "spaces"
        if not (out / "figures.json").exists():
            steps, widths = (5, (4, 4, 4)) if self.job.tiny else (1500, (48, 96, 128))
            options = classifier.Options(out=out, steps=steps, widths=widths, batch=self.network["batch"], flip=True)
            classifier.classifier(str(self.file), options)
        return {"spaces": ", ".join(space.name for space, _ in self.spaces)}

    @cached_property
    def spaces(self) -> Sequence[Space]:
        return find_spaces(str(self.folder / "spaces"), device=self.job.device)

    @cached_property
    def real(self) -> Any:
        return load_images(self.file, "train")

    def teach(self, steps: int, out: Path, save_every: int) -> None:
        options = teach.Options(
            steps=steps,
            **self.network,
            lr=5e-4,
            flip=True,
            precision="bf16" if self.job.gpu else "fp32",
            save_every=save_every,
            preview_every=save_every,
            device=str(self.job.device),
        )
        teach.train_teacher(self.real, out, options)

    def probe(self) -> Figures:
        """Decide how many steps fit into the time left; a call that goes on keeps to it."""
        rmtree(self.folder / "probe", ignore_errors=True)
        self.teach(150, self.folder / "probe", save_every=1000)
        lines = timed(self.folder / "probe")
        second = (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])
        fits = {
            "teacher": TEACHER_SHARE * self.job.left / second,
            "student": STUDENT_SHARE * self.job.left / second / STUDENT_STEP,
        }
        steps = {name: 20 if self.job.tiny else max(200, int(count)) for name, count in fits.items()}
        write_json(self.folder / "steps.json", steps)
        return {"ms per step": 1000 * second, **{f"steps of the {name}": count for name, count in steps.items()}}

    @property
    def steps(self) -> Mapping[str, int]:
        return read_json(self.folder / "steps.json", dict[str, int])

    def train_teacher(self) -> Figures:
        self.teach(self.steps["teacher"], self.folder / "teacher", save_every=max(10, self.steps["teacher"] // 10))
        denoiser, _ = load_model(self.folder / "teacher" / "model")
        weights = sum(p.numel() for p in denoiser.parameters())
        return {"million weights": weights / 1e6, "s": timed(self.folder / "teacher")[-1]["seconds"]}

    def train_student(self) -> Figures:
        steps, every = self.steps["student"], max(1, self.steps["student"] // CHECKPOINTS)
        batch, pairs = (4, 16) if self.job.tiny else (128, 10_000)
        both = ("student", "fake")
        settings = [f"teacher={self.folder / 'teacher'}", f"steps={steps}", f"device={self.job.device}"]
        settings += [f"pairs.count={pairs}", f"pairs.path={self.folder / 'pairs'}", "pairs.shard=500"]
        settings += ["regress.loss=mse", "regress.weight=4", f"match.batch={batch}", f"regress.batch={batch}"]
        settings += [f"{name}.optimizer.{entry}" for name in both for entry in ("lr=5e-4", "warmup=20", "decay=0.4")]
        settings += ["student.ema=0.995", f"precision={'bf16' if self.job.gpu else 'fp32'}", f"log.preview={every}"]
        settings += [f"evaluate.every={every}", f"evaluate.images={self.images}", f"checkpoint.every={every}"]
        settings += [f"evaluate.features={self.folder / 'spaces'}", f"log.every={min(20, every)}"]
        train("cifar10-cond", *settings, out=self.folder / "student", runs=self.folder)
        copyfile(self.folder / "student" / "teacher-student.png", self.job.out / "cifar10-teacher-student.png")
        return {"s": timed(self.folder / "student")[-1]["seconds"]}

    def teachers_figures(self) -> Figures:
        return self.measured(TeacherPipeline.from_pretrained(self.folder / "teacher", self.job.device))

    def students_figures(self) -> Figures:
        return self.measured(DistilledPipeline.from_pretrained(self.folder / "student", self.job.device))

    def measured(self, pipe: Pipeline) -> Figures:
        return dict(evaluate(pipe, self.spaces, n=self.images, seed=1))

    def ratios(self) -> Figures:
        """Of the Frechet distances in each space, at the student's checkpoints and at its end."""
        figures = self.job.results.part(self.job.name)["rows"]
        teacher, student = (figures[f"{name}'s figures"]["figures"] for name in ("teacher", "student"))
        distances = [space.distance for space, _ in self.spaces if teacher[space.distance] > 0]
        found = {
            f"{name}, step {line['step']}": line[name] / teacher[name]
            for line in log(self.folder / "student")
            for name in distances
            if name in line
        }
        return {**found, **{f"{name}, at the end": student[name] / teacher[name] for name in distances}}


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def timed(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that say when."""
    return [line for line in log(run) if "seconds" in line]
