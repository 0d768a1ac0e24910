"""The options that more than one verb takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moetailor_cli.completion import complete_method

# The groups of help, the same on all verbs.
READS = "What it reads"
DECIDES = "How it decides"
AMOUNT = "How much stays"
MEASURES = "What it measures"
TRAINS = "How it trains"
WRITES = "What it writes"
RUNS = "Where it runs"
SERVES = "What serves it"
EVERY = "Every verb"
PANELS = (READS, DECIDES, AMOUNT, MEASURES, TRAINS, WRITES, RUNS, SERVES, EVERY)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub name.")]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Branch, tag or commit of the model that has a hub name; the same as NAME@REVISION.",
        rich_help_panel=READS,
    ),
]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="FILE[:weight], .jsonl, .txt (or these with .gz or .zst) or .parquet; or NAME[:weight] for the datasets "
        "library, where NAME may go on as in NAME,CONFIG[@SPLIT]; with text, messages, or prompt and completion. "
        "Repeatable: sources are mixed by weight.",
        rich_help_panel=READS,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="The column that holds the text of a row. [dim]default: text, messages, or prompt and completion[/dim]",
        rich_help_panel=READS,
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Blocks of text to run.", rich_help_panel=READS)]
Length = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a block. [dim]default: 2048, or what the model takes at most[/dim]",
        rich_help_panel=READS,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Shuffle the documents, and draw another sample of tokens; file order when absent.", rich_help_panel=READS
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Blocks run at once.", rich_help_panel=RUNS)]
SampleTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of which each layer's inputs are kept. [dim]default: two for each expert and dimension, at least "
        "16,384, as far as --sample-size goes[/dim]",
        rich_help_panel=MEASURES,
    ),
]
SampleSize = Annotated[str, typer.Option(help="What these may take on disk, in all layers.", rich_help_panel=MEASURES)]
MaskSpecial = Annotated[
    bool, typer.Option("--mask-special", help="Leave special tokens out of every statistic.", rich_help_panel=READS)
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Hold one decoder layer in memory at a time; for checkpoints larger than memory.",
        rich_help_panel=RUNS,
    ),
]
States = Annotated[
    Literal["auto", "memory", "disk"],
    typer.Option(
        help="Where hidden states wait between layers; auto is the disk when streaming, else memory.",
        rich_help_panel=RUNS,
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Folder for hidden states while they are needed. [dim]default: the system's temporary one[/dim]",
        rich_help_panel=RUNS,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where the model runs. [dim]default: cuda if there is one, else cpu[/dim]", rich_help_panel=RUNS),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16. [dim]default: the checkpoint's on cuda, float32 on cpu[/dim]",
        rich_help_panel=RUNS,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Spread the model over devices, as transformers does: auto, balanced, ...", rich_help_panel=RUNS),
]
BatchMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory that experts computed together may take, such as 1GB; where a layer's experts take more, they are "
        "read from disk one after the other. [dim]default: 1 GiB, a quarter of what is free on a GPU[/dim]",
        rich_help_panel=RUNS,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the checkpoint, or with tasks.", rich_help_panel=READS
    ),
]
Engine = Annotated[str, typer.Option(help="What serves it: transformers, vllm or llama.cpp.", rich_help_panel=SERVES)]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help="Name of a method; see `moetailor methods`.",
        autocompletion=complete_method,
        rich_help_panel=DECIDES,
    ),
]
Native = Annotated[
    bool,
    typer.Option(
        "--native",
        help="With --method auto: only what stock engines load, which is --method refit -p neurons=chosen.",
        rich_help_panel=DECIDES,
    ),
]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform-layers",
        help="With --method auto: keep every expert, those of a layer in one number of bits, as engines and GGUF hold "
        "them; -p widths=8,4 says which.",
        rich_help_panel=DECIDES,
    ),
]
Remove = Annotated[
    str | None, typer.Option(help="Share of each layer's experts to remove, such as 25%.", rich_help_panel=AMOUNT)
]
Keep = Annotated[int | None, typer.Option(help="Experts to keep in each layer.", rich_help_panel=AMOUNT)]
Size = Annotated[
    str | None,
    typer.Option(
        help="Bytes the result's tensors may take, such as 12GB (10^9), 11GiB (2^30) or 60% of the original's.",
        rich_help_panel=AMOUNT,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="The same, for the tensors once they are loaded: what must be free to hold them.", rich_help_panel=AMOUNT
    ),
]
LoadDtype = Annotated[
    str | None,
    typer.Option(
        help="What --memory loads them in: bfloat16, float16, float32. [dim]default: as stored[/dim]",
        rich_help_panel=AMOUNT,
    ),
]
Parameter = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", help="name=value, a parameter of the method. Repeatable.", rich_help_panel=DECIDES),
]
Layers = Annotated[
    str | None,
    typer.Option(help="Decoder layers to change, such as 0-7,12; all MoE layers when absent.", rich_help_panel=DECIDES),
]
Protect = Annotated[
    list[str] | None, typer.Option(help="layer:expert that must stay. Repeatable.", rich_help_panel=DECIDES)
]
Guard = Annotated[
    bool, typer.Option("--guard-super-experts", help="Protect experts with extreme outputs.", rich_help_panel=DECIDES)
]
Allocation = Annotated[
    str,
    typer.Option(
        "--allocation",
        help="How many experts each layer keeps, the budget's in all: uniform, error (more where constants would lose "
        'more), global (the best scores of all layers), or FILE.json with a number or share of each layer: {"0": 24, '
        '"1": "75%"}.',
        rich_help_panel=AMOUNT,
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        help="Keep what stays of experts in few bits: 2 to 8, as 4/6 with those of the down projection, or as int4g32: "
        "symmetric, in groups of 32, as vq2: 1 to 4 bits from codebooks, for the moetailor format, or floats: fp8, "
        "fp8b128 (blocks of 128 x 128), mxfp4, nvfp4. "
        "[dim]default: as it lies[/dim]",
        rich_help_panel=AMOUNT,
    ),
]
Format = Annotated[
    Literal["auto", "native", "moetailor", "compressed-tensors", "gguf", "expanded", "vllm-mone"],
    typer.Option(
        metavar="<form>",
        help="native loads anywhere, moetailor after `import moetailor`, compressed-tensors (experts in 4 or 8 bits) "
        "in vLLM and mostly in transformers, gguf in llama.cpp, vllm-mone (constants) in vLLM, expanded anywhere, but "
        "as large as the original; auto is native where the plan allows it, else moetailor.",
        rich_help_panel=WRITES,
    ),
]
Converter = Annotated[
    Path | None,
    typer.Option(
        help="With --format gguf: llama.cpp's script that converts checkpoints, which is run. [dim]default: what to "
        "run is said[/dim]",
        rich_help_panel=WRITES,
    ),
]
Quantizer = Annotated[
    Path | None,
    typer.Option(
        help="With --converter: llama.cpp's llama-quantize, which gives the experts the plan's bits.",
        rich_help_panel=WRITES,
    ),
]
Propagate = Annotated[
    Literal["original", "compressed"],
    typer.Option(
        metavar="<inputs>",
        help="What stand-ins and merged experts are fitted on: original, their layer's inputs in the original model, "
        "or compressed, those that the compressed layers before it give.",
        rich_help_panel=DECIDES,
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="NAME",
        help="Upload the finished folder with its card to this repository of the hub, which is made if need be.",
        rich_help_panel=WRITES,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an earlier result, once the new one is complete.", rich_help_panel=WRITES
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check what needs no data, say how long it will take, with how much memory and disk, and stop.",
        rich_help_panel=WRITES,
    ),
]
