"""`distmatch serve`: opens the local web page; `web_page` serves it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from distmatch.commands.shared import find_student, find_teacher, guidance_of, starting
from distmatch.system.extras import need
from distmatch.system.options import WHOLE, Count, Name, Range, Scale


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    teacher: Name | None = None
    """The student's teacher, for the game: a model folder, mnist, diffusers:FOLDER_OR_ID."""

    steps: Count | None = None
    """Number of the teacher's sampler steps; default: 18 of Heun, 50 of PNDM for Stable Diffusion."""

    guidance: Scale | None = None
    """The teacher's guidance scale; default: that of the student's training."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than 127.0.0.1 lets everybody on your network use the page."""

    port: Annotated[int, WHOLE, Parameter(validator=Range(0, 65535))] = 7860
    """Port to listen on; if it is taken, a free one is used."""

    device: str = "auto"
    """auto, cpu or cuda."""

    compile: bool = False
    """Compile the student's network and decoder with torch.compile (CUDA graphs on a GPU); the first picture then
    takes up to minutes, the others less. Needs a C++ compiler."""

    cuda_graphs: bool = False
    """On a GPU, record network, decoder and rounding to 8 bits as one CUDA graph, at the first picture, and replay it
    for the others, which then do not wait for Python; nothing is compiled."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the student's network and decoder are held and computed in bf16, about twice as fast on a GPU."""

    open_browser: bool = False
    """Open the page in your browser."""


def serve(model: Name, /, options: Options = Options()) -> None:
    """Open a local web page that draws as you drag or type, and asks which picture is the teacher's.

    Parameters
    ----------
    model
        A student: a model or run folder, or a model of the package: mnist, emoji.
    """
    need("fastapi", "uvicorn", "websockets", by="the web page")
    starting(f"Loading PyTorch and {model}")
    from distmatch.commands.web_page import serve as listen

    # Only the thread that draws may call what is compiled: until torch 2.15, CUDA graphs belong to one thread.
    how = {"compile": options.compile, "cuda_graphs": options.cuda_graphs, "precision": options.precision}
    student = find_student(model, None, options.device, **how)
    teacher = None
    if options.teacher:
        guidance = options.guidance
        if guidance is None:
            guidance = guidance_of(student)
        teacher = find_teacher(options.teacher, options.steps, guidance, options.device)
    listen(student, teacher, options.host, options.port, options.open_browser)
