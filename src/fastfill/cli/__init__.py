"""The command `fastfill`: a file per group of verbs. Heavy imports happen inside the verbs, so that help is instant."""

from fastfill.cli.parser import build_parser as build_parser
from fastfill.cli.parser import main as main
