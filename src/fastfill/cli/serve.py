"""serve: vLLM's server with an artifact on."""

from __future__ import annotations

import argparse

from fastfill.cli.options import MODEL_HELP, Commands


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
    serve.add_argument("--artifact", metavar="DIR", required=True, help="folder, or 'default' for the shipped one")
    serve.add_argument("--sparsity", type=float, help="share of FFN neurons skipped, 0 to 0.95 (default: the artifact's)")
    serve.add_argument("--sparse-block-size", type=int, help="tokens per selection (default: the artifact's)")
    serve.add_argument("--min-tokens", type=int, help="shorter prompts stay dense (default: the artifact's)")
    serve.add_argument("--dense-tail", type=int, help="last tokens of a prompt that stay dense (default: 0, see docs/vllm.md)")
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
        sparsity=arguments.sparsity,
        block_size=arguments.sparse_block_size,
        min_tokens=arguments.min_tokens,
        dense_tail=arguments.dense_tail,
        kernel=arguments.kernel,
        one_copy=arguments.one_copy or None,
    )
