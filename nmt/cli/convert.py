"""nmt-convert: a model folder from a model of another toolkit, or the other way round."""

import itertools
import sys
from collections.abc import Sequence

from nmt.checkpoints.find_folder import find_model
from nmt.cli.command import announce_models, run_command
from nmt.cli.options import ExportOptions, ImportOptions
from nmt.cli.text_files import check_parallel, read_text
from nmt.config.fields import list_options
from nmt.config.mapping import asks_for, parse_command, peek, print_version
from nmt.errors import UserError, one_line
from nmt.system.places import check_new_folder

PROG = "nmt-convert"
_EXIT_DISAGREEMENT = 1
_IMPORT_FORM = "--from fairseq CHECKPOINT --dict-dir DIR --to MODEL_DIR"
_EXPORT_FORM = "MODEL_DIR --to ctranslate2 DIR"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    arguments = sys.argv[1:] if argv is None else argv

    def body() -> None:
        if _is_import(arguments):
            import_model(parse_command(ImportOptions, arguments, prog=PROG, description=_description()))
        else:
            export_model(parse_command(ExportOptions, arguments, prog=PROG, description=_description()))

    run_command(PROG, body)


def import_model(options: ImportOptions) -> None:
    """Convert a checkpoint of fairseq to a model folder."""
    from nmt.interop.fairseq import convert_checkpoint

    check_new_folder(options.to, name="to")
    done = convert_checkpoint(
        options.checkpoint,
        options.dict_dir,
        options.to,
        source_lang=options.source_lang,
        target_lang=options.target_lang,
    )
    if done.is_guessed:
        print(
            one_line(
                f"{PROG}: warning: nothing tells which language is the source; taken for it is {done.source_lang} "
                "(say it with --source-lang)"
            ),
            file=sys.stderr,
        )
    print(f"{options.to}: {done.source_lang} to {done.target_lang}, {done.num_parameters:,} weights")


def export_model(options: ExportOptions) -> None:
    """Convert a model folder for CTranslate2, and let both models translate a sample.

    Raises:
        SystemExit: With code 1 if their translations differ; then nothing is written.
    """
    if options.sample is not None:
        check_parallel(options.sample)

    from nmt.interop.agreement import random_sentences
    from nmt.interop.ctranslate2 import DisagreementError, export
    from nmt.translation.translator import Translator

    (model,) = announce_models(PROG, [find_model(options.model)])
    translator = Translator.load(model)
    if options.sample is None:
        sample = random_sentences(translator, options.sample_size)
    else:
        sample = list(itertools.islice(read_text(options.sample), options.sample_size))
    _, folder = options.to
    try:
        exact, quantized = export(translator, folder, sample, quantization=options.quantization)
    except DisagreementError as error:
        print(f"{PROG}: CTranslate2 does not translate like the model: {error}", file=sys.stderr)
        raise SystemExit(_EXIT_DISAGREEMENT) from None
    aside = "" if quantized is None else ", what quantisation changes aside"
    print(f"{folder}: CTranslate2 translates like the model{aside}")
    print(f"float32: {exact}")
    if quantized is not None:
        print(f"{options.quantization}: {quantized}")


def _is_import(arguments: Sequence[str]) -> bool:
    """Return the direction.

    Raises:
        UserError: The direction is not clear, or an option belongs to the other direction.
    """
    toolkit = peek(arguments, "--to")
    is_import = any(argument.partition("=")[0] == "--from" for argument in arguments)
    if asks_for(arguments, "--version"):
        print_version(PROG)
    if asks_for(arguments, "--help", "-h"):
        return is_import
    if not is_import and toolkit != "ctranslate2":
        raise UserError(
            f"`nmt-convert` must be told the direction: `{PROG} {_IMPORT_FORM}` or `{PROG} {_EXPORT_FORM}`."
        )
    own, other = (ImportOptions, ExportOptions) if is_import else (ExportOptions, ImportOptions)
    foreign = _flags(other) - _flags(own)
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in foreign:
            form = _EXPORT_FORM if is_import else _IMPORT_FORM
            raise UserError(f"`{flag}` must be left out here: it belongs to `{PROG} {form}`.")
    return is_import


def _flags(type_: type) -> set[str]:
    return {option.flag for option in list_options(type_) if not option.is_positional}


def _description() -> str:
    return (
        f"Convert a model of fairseq to a model folder:\n  {PROG} {_IMPORT_FORM}\n"
        f"or a model folder for CTranslate2:\n  {PROG} {_EXPORT_FORM}\n"
        "`--from fairseq --help` shows the options of the first, `--help` those of the second."
    )


if __name__ == "__main__":
    main()
