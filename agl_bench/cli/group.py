"""The group that all commands join."""

from __future__ import annotations

from typing import Any

import click


class _Command(click.Command):
    """Takes no empty text, which would count as left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            if parameter.name and ctx.params.get(parameter.name) == "":
                raise click.BadParameter("it is empty; give it a value, or leave it out", ctx, parameter)
        return rest


class _Commands(click.Group):
    """Suggests the nearest command."""

    command_class = _Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        import difflib

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{hint} Commands: {', '.join(sorted(self.commands))}.")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agl-bench", prog_name="agl-bench")
def cli() -> None:
    """The pluggable benchmark for auxiliary-gene selection.

    Try: agl-bench run --selectors pgl,agl,hvg_k,dkgsb --datasets synthetic
    """
