"""One training step beside those of DMD2 and FastGen: the same network, the same batch, one CPU thread.

    uv run python benchmarks/peers.py --dmd2 FOLDER --fastgen FOLDER

Each FOLDER is your checkout of the peer; its step is imported from there, never copied. What a step imports but does
not need on a CPU is replaced by a stand-in of ours. See peers.md for what is compared and what the figures say.
"""

import io
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import cyclopts
import torch
from step import bare, timed
from step import step as stepping
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from distmatch.diffusion.denoiser import Cond, Denoiser, Prediction
from distmatch.diffusion.schedule import EDM
from distmatch.evaluation.measure import hardware
from distmatch.models.edm.networks import SongUNet
from distmatch.models.folder import Info, save_model
from distmatch.recipe import build, subjects
from distmatch.recipe.loading import load_recipe

CLASSES, SHAPE, RATE = 10, (3, 32, 32), 5e-5

Run = Callable[[], None]


def main(
    *,
    dmd2: Path | None = None,
    fastgen: Path | None = None,
    channels: int = 64,
    blocks: int = 1,
    batch: int = 8,
    rounds: int = 9,
) -> None:
    """Time the steps in turn and print the ratio of each peer's CPU time to ours.

    Args:
        channels, blocks: width and residual blocks per resolution of EDM's network for CIFAR-10 (128 and 4 at full
            size).
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = SongUNet(label_dim=CLASSES, model_channels=channels, num_blocks=blocks, dropout=0.0)
    teacher = Denoiser(net, EDM(), Prediction("edm"))
    work = ours(teacher, batch)
    if dmd2 is not None:
        work["DMD2"] = dmd2_step(dmd2, teacher, batch)
    if fastgen is not None:
        work["FastGen"] = fastgen_step(fastgen, teacher, batch)
    weights = sum(p.numel() for p in net.parameters())
    device = torch.device("cpu")
    print({**hardware(device), "weights": weights, "batch": batch, "rounds": rounds})
    flops = {name: counted(run) for name, run in work.items()}
    seconds = timed(work, device, rounds, time.process_time)
    for name, taken in seconds.items():
        print(
            f"{name:12} {median(taken):7.3f} s of CPU time ({min(taken):.3f} to {max(taken):.3f}), "
            f"{flops[name] / flops['bare passes']:.3f} of the bare passes' FLOPs"
        )
    for name in [name for name in work if name != "distmatch"]:
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds["distmatch"], strict=True)]
        print(f"{name + ' / distmatch':24} {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def counted(run: Run) -> int:
    with FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops()


def ours(teacher: Denoiser, batch: int) -> dict[str, Run]:
    """Our step as the recipe `cifar10-cond-noreg` does it, and its bare network passes."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), teacher, Info(SHAPE, tuple(str(i) for i in range(CLASSES))))
        recipe = load_recipe("cifar10-cond-noreg", [f"teacher={folder}", f"match.batch={batch}", "device=cpu"])
        subject = subjects.subject(recipe)
    distiller = build.distiller(recipe, subject, None)
    limit = bare(distiller, subject.denoiser, subject.info, recipe)
    return {"distmatch": stepping(distiller), "bare passes": limit}


def stand_in(**contents: Any) -> ModuleType:
    module = ModuleType("stand_in")
    vars(module).update(contents)
    return module


def package(folder: Path) -> ModuleType:
    """A package whose modules come from `folder`, without running its `__init__.py`, which may import everything."""
    return stand_in(__path__=[str(folder)])


def imported(name: str, stand_ins: dict[str, ModuleType]) -> Any:
    """Import the module `name` while `stand_ins` take the places of others; afterwards nothing of this is left."""
    for place, module in stand_ins.items():
        module.__name__ = place  # `import a.b as c` looks for b under a's name
    with patch.dict(sys.modules, stand_ins):
        return import_module(name)


def nothing(*_: Any, **__: Any) -> None:
    pass


class AsDMD2(nn.Module):
    """Our network, called as DMD2 calls EDM's: labels are one-hot."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    @property
    def model(self) -> nn.Module:
        return self.denoiser.net

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return self.denoiser(x, sigma.flatten(), Cond(label=labels.argmax(1)))


class Accelerator:
    """One process on the CPU, and not the main one, which would write logs."""

    device, process_index, is_main_process, state = torch.device("cpu"), 0, False, "one process on the CPU"
    wait_for_everyone = nothing

    def __init__(self, **_: Any):
        pass

    def prepare(self, first: Any, *others: Any) -> Any:
        return (first, *others) if others else first

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)


def cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def warmed_up(_: str, optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, step / num_warmup_steps))


def dmd2_step(folder: Path, teacher: Denoiser, batch: int) -> Run:
    """`Trainer.train_one_step`, without a GAN: one update of the student and one of the fake score."""
    network = AsDMD2(deepcopy(teacher))
    images = [{"images": torch.rand(SHAPE), "class_labels": torch.tensor([i % CLASSES])} for i in range(2 * batch)]
    module = imported(
        "main.edm.train_edm",
        {
            "main": package(folder / "main"),
            "main.edm": package(folder / "main" / "edm"),
            "main.edm.edm_network": stand_in(get_edm_network=lambda _: deepcopy(network)),
            "main.data.lmdb_dataset": stand_in(LMDBDataset=lambda _: images),
            "main.utils": stand_in(
                cycle=cycle,
                prepare_images_for_saving=nothing,
                draw_valued_array=nothing,
                draw_probability_histogram=nothing,
            ),
            "accelerate": stand_in(Accelerator=Accelerator),
            "accelerate.utils": stand_in(ProjectConfiguration=nothing, set_seed=torch.manual_seed),
            "diffusers.optimization": stand_in(get_scheduler=warmed_up),
            "dnnlib": stand_in(util=stand_in(open_url=lambda _: io.BytesIO(pickle.dumps({"ema": network})))),
            "matplotlib": stand_in(use=nothing),
            "wandb": stand_in(),
        },
    )
    options = {"batch_size": batch, "label_dim": CLASSES, "generator_lr": RATE, "guidance_lr": RATE, "num_workers": 0}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with patch.object(sys, "argv", ["train_edm.py", "--wandb_name=none", "--initialie_generator", *arguments]):
        trainer = module.Trainer(module.parse_args())

    def run() -> None:
        trainer.train_one_step()
        trainer.step += 1

    return run


class AsFastGen(nn.Module):
    """Our network, called as FastGen calls its own."""

    net_pred_type = "x0"

    def __init__(self, denoiser: Denoiser, noise_scheduler: nn.Module):
        super().__init__()
        self.denoiser, self.noise_scheduler = denoiser, noise_scheduler

    def forward(self, x: Tensor, t: Tensor, condition: Cond, fwd_pred_type: str) -> Tensor:
        assert fwd_pred_type == "x0"
        return self.denoiser(x, t.to(x.dtype), condition)


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 1))


def fastgen_step(folder: Path, teacher: Denoiser, batch: int) -> Run:
    """Two iterations of `DMD2Model`, without a GAN: an update of the student, then one of the fake score."""
    source = folder / "fastgen"
    levels = ("debug", "info", "success", "warning", "critical")
    stand_ins = {
        "fastgen": package(source),
        "fastgen.methods": package(source / "methods"),
        "fastgen.methods.distribution_matching": package(source / "methods" / "distribution_matching"),
        "fastgen.networks": package(source / "networks"),
        "fastgen.configs.opt": stand_in(get_scheduler=lambda optimizer, config: LambdaLR(optimizer, lambda _: 1.0)),
        "fastgen.utils": stand_in(instantiate=lambda make, **given: make(**given), expand_like=expand_like),
        "fastgen.utils.basic_utils": stand_in(
            PRECISION_MAP={"float32": torch.float32, "float64": torch.float64}, convert_cfg_to_dict=vars
        ),
        "fastgen.utils.distributed": stand_in(synchronize=nothing, is_rank0=lambda: True, world_size=lambda: 1),
        "fastgen.utils.io_utils": stand_in(s3_load=nothing),
        "fastgen.utils.logging_utils": stand_in(**dict.fromkeys(levels, nothing)),
        "diffusers": stand_in(DDIMScheduler=None, CogVideoXDPMScheduler=None),
        "scipy": stand_in(stats=None),
    }
    for name in ("fastgen.networks.noise_schedule", "fastgen.methods.model", "fastgen.methods.common_loss"):
        stand_ins[name] = imported(name, stand_ins)
    vars(stand_ins["fastgen.methods"])["FastGenModel"] = vars(stand_ins["fastgen.methods.model"])["FastGenModel"]
    module = imported("fastgen.methods.distribution_matching.dmd2", stand_ins)
    schedule = vars(stand_ins["fastgen.networks.noise_schedule"])["EDMNoiseSchedule"]()
    network = AsFastGen(deepcopy(teacher), schedule)
    model = module.DMD2Model(fastgen_config(network))
    model.init_optimizers()
    iterations = iter(range(10**9))
    real = torch.zeros(batch, *SHAPE)  # only its shape and type matter: there is no GAN

    def run() -> None:
        for iteration in (next(iterations), next(iterations)):
            data = {"real": real, "condition": Cond(label=torch.randint(0, CLASSES, (batch,))), "neg_condition": None}
            # From here on as in FastGen's Trainer.train_step, whose callbacks (clipping, EMA) are left out.
            with model.autocast():
                losses, _ = model.single_train_step(data, iteration)
            model.grad_scaler.scale(losses["total_loss"]).backward()
            model.optimizers_schedulers_step(iteration)
            model.optimizers_zero_grad(iteration)

    return run


def fastgen_config(network: AsFastGen) -> SimpleNamespace:
    def adamw(model: nn.Module) -> AdamW:
        return AdamW(model.parameters(), lr=RATE, fused=True)

    return SimpleNamespace(
        device="cpu",
        precision="float32",
        precision_amp=None,
        precision_amp_infer=None,
        precision_amp_enc=None,
        precision_fsdp=None,
        input_shape=SHAPE,
        net=lambda: deepcopy(network),
        teacher=None,
        pretrained_model_path=None,  # every network is a copy with the same weights
        pretrained_student_net_path=None,
        load_student_weights=False,
        enable_preprocessors=False,
        use_ema=False,
        fsdp_meta_init=False,
        add_teacher_to_fsdp_dict=False,
        guidance_scale=None,
        skip_layers=None,
        student_update_freq=2,
        student_sample_steps=1,
        sample_t_cfg=SimpleNamespace(time_dist_type="polynomial", t_list=None),
        fake_score_sample_t_cfg=None,
        fake_score_pred_type=None,
        gan_loss_weight_gen=0,
        gan_r1_reg_weight=0,
        net_optimizer=adamw,
        net_scheduler=None,
        fake_score_optimizer=adamw,
        fake_score_scheduler=None,
        grad_scaler_enabled=False,
        grad_scaler_init_scale=1.0,
        grad_scaler_growth_interval=1,
    )


if __name__ == "__main__":
    cyclopts.run(main)
