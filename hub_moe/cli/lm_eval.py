"""`hub-moe lm-eval`: lm_eval's own command, which then knows our models."""

import typer


def lm_eval(context: typer.Context) -> None:
    """Pass every argument on to lm_eval's command, with our models known to it.

    `--model hf` loads HubMoe checkpoints and expert patches, and `--model hub_moe` computes what prompts share once.
    Nothing is recorded: use `hub-moe eval` for numbers that others can check. In Python, `import hub_moe.modeling` does
    the same for `lm_eval.simple_evaluate(model="hf", ...)`.

    \b
    Examples:
      hub-moe lm-eval run --model hf --model_args pretrained=runs/demo/base/model --tasks arc_easy
      hub-moe lm-eval ls tasks
      hub-moe lm-eval -- run --help        # lm_eval's own help
    """
    from .. import modeling  # noqa: F401  (registers hub_moe)
    from ..evals.prefix_lm import run_lm_eval

    raise typer.Exit(run_lm_eval(context.args))
