"""The `dspark` command: gathers the commands, and turns a person's mistake into one line and exit code 2."""

from __future__ import annotations

import os
import sys

import typer

from dspark.cli import (
    bench,
    calibrate,
    certify,
    data,
    demo,
    evaluate,
    export,
    generate,
    profile,
    serve,
    simulate,
    train,
)
from dspark.common.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, calibrate, plan and serve DSpark speculative decoding, losslessly.",
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(profile.profile)
app.command()(simulate.simulate)
app.command()(calibrate.calibrate)
app.command()(certify.certify)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"dspark {installed('dspark')}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for bad input, 130 when interrupted."""
    try:
        code = app(args=arguments, prog_name="dspark", standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # usage errors, whose class moved between versions of typer
            raise
        return _fail(f"{error.format_message()} Try --help." if error.format_message() else "")
    return code if isinstance(code, int) else 0


def run() -> None:
    """The console script. Leaves at once on an error: a forward being compiled in the background is not waited for."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def _fail(message: str) -> int:
    if message:
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
