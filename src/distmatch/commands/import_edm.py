"""`distmatch import edm`: converts an EDM checkpoint to a model folder."""

from pathlib import Path

from cyclopts import App

from distmatch.system.options import Name, Out

app = App(name="import", help="Turn foreign checkpoints into model folders. Nothing in them is executed.")


@app.command(name="edm")
def import_edm(source: Name, /, *, out: Out = None) -> None:
    """Import a checkpoint of Karras et al. 2022. Recipes can also use one directly: teacher=edm:FILE.

    Parameters
    ----------
    source
        A .pkl file or a URL, e.g. https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-cond-vp.pkl.
    out
        The model folder; default: models/NAME.
    """
    from distmatch.models.edm import checkpoints
    from distmatch.system.ownership import owned
    from distmatch.system.screen import console
    from distmatch.system.terminal import command

    folder = out or Path("models") / Path(source).stem
    with owned(folder):
        denoiser, info = checkpoints.import_edm(source, folder)
        parameters = sum(p.numel() for p in denoiser.parameters())
        console.print(
            f"{parameters:,} parameters, images {info.shape}, {len(info.classes) or 'no'} classes, "
            f"prediction {denoiser.prediction.name}; in {folder}. Next: "
            f"{command('sample', folder, '--teacher', '-n', 16)}"
        )
