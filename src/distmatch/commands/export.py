"""`distmatch export diffusers` and `distmatch export lora`: write a student in diffusers' format."""

from pathlib import Path

from cyclopts import App

from distmatch.system.options import Name, Out

app = App(name="export", help="Turn students into other libraries' formats.")


@app.command
def diffusers(run: Name, /, *, out: Out = None, source: Name | None = None, half: bool = False) -> None:
    """Write a student of a model in diffusers' format as a folder that DiffusionPipeline.from_pretrained opens.

    The pipeline makes the student's image with num_inference_steps=1, and where it is guided guidance_scale=1: the
    student's time and prediction are in the scheduler's settings. A student trained on a range of guidance takes
    guidance_scale from it.

    Parameters
    ----------
    run
        A run or model folder.
    out
        The folder; default: RUN-diffusers. An older export there is replaced once the new one is written.
    source
        The teacher in diffusers' format whose text encoders and autoencoder are included; default: that of the run.
    half
        Write the weights in half precision.
    """
    from distmatch.models.diffusers.export import export_diffusers

    export_diffusers(run, out or Path(f"{run.rstrip('/')}-diffusers"), source, half)


@app.command
def lora(run: Name, /, *, out: Out = None) -> None:
    """Write the adapters of a student trained with student.adapter.rank as a LoRA in diffusers' format, with its
    scheduler.

    Parameters
    ----------
    run
        A run folder.
    out
        The folder; default: RUN-lora. An older export there is replaced once the new one is written.
    """
    from distmatch.models.diffusers.export import export_lora

    export_lora(run, out or Path(f"{run.rstrip('/')}-lora"))
