"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "AllowCpuCompute",
    "DeviceMap",
    "Dtype",
    "MaxMemory",
    "OffloadFolder",
    "PathArgument",
    "Revision",
    "Subfolder",
    "TrustRemoteCode",
    "Variant",
    "WithTraceback",
]

PathArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="A checkpoint: folder, weight file, index file, or Hub repo id.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        "-m",
        metavar="LIMITS",
        help="What may be used, such as [bold]cpu=8GiB[/bold] or [bold]cpu=8GiB,disk=500GB[/bold]. "
        "What is not stated: what is free.",
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="[bold]auto[/bold], [bold]cpu[/bold], [bold]disk[/bold], a JSON object such as "
        """[bold]'{"": "disk", "lm_head": "cpu"}'[/bold], or a file with such an object or a saved plan.""",
    ),
]
AllowCpuCompute = Annotated[
    bool, typer.Option("--allow-cpu-compute", help="Beside accelerators, let the CPU run what rests in host memory.")
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, or a torch dtype such as bfloat16.")]
Revision = Annotated[
    str | None, typer.Option("--revision", rich_help_panel="Checkpoint", help="Branch, tag or commit of a Hub repo.")
]
Subfolder = Annotated[
    str | None, typer.Option("--subfolder", rich_help_panel="Checkpoint", help="Folder inside the checkpoint.")
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", rich_help_panel="Checkpoint", help="Such as fp16, for model.fp16.safetensors."),
]
OffloadFolder = Annotated[
    str | None,
    typer.Option(
        "--offload-folder",
        metavar="FOLDER",
        rich_help_panel="Checkpoint",
        help="Where weights are kept that must be converted before they can stream; a cache folder by default.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", rich_help_panel="Checkpoint", help="Let Python code that comes with the checkpoint run."
    ),
]
WithTraceback = Annotated[bool, typer.Option("--traceback", help="On an error, show where it was raised.")]
