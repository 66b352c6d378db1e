"""serve: vLLM's server with an artifact on."""

from __future__ import annotations

import argparse

from fastfill.cli.options import ARTIFACT_HELP, MODEL_HELP, Commands, finetuned_option, settings_of, settings_options


def add_serve(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="vLLM's OpenAI-compatible server with the artifact on.",
        description="vLLM's OpenAI-compatible server with the artifact on. All other options go to `vllm serve`; it binds to "
        "127.0.0.1 unless --host says otherwise.",
        usage="fastfill serve MODEL --artifact DIR [options] [any option of vllm serve]",
        epilog="example: fastfill serve default --artifact default --port 8000 --max-model-len 4096",
        allow_abbrev=False,
    )
    serve.set_defaults(run=run_serve, json=False, takes_rest=True)
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    serve.add_argument("--artifact", metavar="DIR", required=True, help=ARTIFACT_HELP)
    finetuned_option(serve)
    settings_options(serve, block_size="--sparse-block-size")  # --block-size is vLLM's own
    serve.add_argument("--kernel", help="auto, native or torch (default: auto)")
    serve.add_argument(
        "--one-copy",
        action="store_true",
        help="less memory: dense tokens by the sparse kernel too, no copy of the FFN for vLLM's",
    )


def run_serve(arguments: argparse.Namespace) -> None:
    from fastfill.engines import vllm

    vllm.serve(
        arguments.model,
        arguments.artifact,
        arguments.rest,
        **settings_of(arguments),
        kernel=arguments.kernel,
        one_copy=arguments.one_copy or None,
        allow_finetuned=arguments.allow_finetuned or None,
    )
