"""Turn the variables of `make` into options: `make deploy MODEL=flux DRY_RUN=1` into `--model="$MODEL" --dry-run`.

The Makefile runs this file before any recipe, as `make_options.py TARGET GOALS NAME=VALUE ...`. TARGET is the target
whose options are wanted, or empty. GOALS are the targets of the command line, and the others are its variables. The
output is `ok` and the options, or `error:` and a message. An option names its variable, so no shell parses the value.
"""

from __future__ import annotations

import difflib
import os
import re
import sys

FOR_ALL_MODELS = "NAMESPACE VENDOR REGION ACCESS MIN_REPLICA MAX_REPLICA SCALE_TO_ZERO IMAGE TIMEOUT KEEP DRY_RUN"
TAKES = {
    "serve": "MODEL PORT HOST WEIGHTS DEVICE DTYPE",
    "deploy": f"MODEL NAME INSTANCE SIZE WEIGHTS REVISION {FOR_ALL_MODELS}",
    "deploy-all": FOR_ALL_MODELS,
    "endpoints": "NAMESPACE",
    "smoke": "MODEL NAMESPACE NAME URL",
    "pause": "MODEL NAMESPACE NAME",
    "pause-all": "NAMESPACE",
    "resume": "MODEL NAMESPACE NAME TIMEOUT KEEP",
    "undeploy": "MODEL NAMESPACE NAME DELETE_REPO YES",
    "canary": "NAMESPACE TIMEOUT",
    "bench": "DEVICE MODELS",
    "fuzz": "COUNT SEED KIND MEMORY_MB ONLY TOOLKIT",
    "soak": "MINUTES SEED TOOLKIT",
    "image": "TARGET TAG BUILD_ARGS",
    "test-image": "TAG",
    "test": "ARGS",
    "test-endpoint": "ARGS TOOLKIT",
    "test-page": "PAGE_ARGS TOOLKIT",
}
"""The variables that each target takes."""
PATHS = {"PYTHON", "VENV", "BIN", "ENDPOINT_VENV", "DEPLOY_VENV"}
"""Variables of every target. They are part of rules and recipes, so they have plain characters alone."""
SWITCHES = {"DRY_RUN", "KEEP", "YES", "DELETE_REPO"}
EXPORTED_BY_SYSTEMS = {"NAME", "HOST"}


def check(goals: list[str], variables: dict[str, str]) -> None:
    """Raise `ValueError` for a variable that no goal takes, a value that is not valid, or an exported variable."""
    command = f"make {' '.join(goals)}".strip()
    taken = sorted({name for goal in goals for name in TAKES.get(goal, "").split()})
    for name in PATHS & variables.keys():
        if re.fullmatch(r"[\w./+-]*", variables[name], re.ASCII) is None:
            raise ValueError(f"{name} is a path of letters, digits and _ . / + -")
    if unknown := sorted(variables.keys() - PATHS - {"OMP_WAIT_POLICY"} - set(taken)):
        raise ValueError(describe_unknown(unknown, taken, command))
    for name in sorted(SWITCHES & variables.keys()):
        if variables[name] not in ("", "0", "1"):
            raise ValueError(f"{name}={variables[name]} is neither 1, for on, nor 0")
    # `DRY_RUN=1 make deploy` must not deploy, so an exported variable is an error.
    if exported := [name for name in taken if name in os.environ.keys() - variables.keys() - EXPORTED_BY_SYSTEMS]:
        names = " ".join(exported)
        raise ValueError(f"the environment has {names}, and is not read: write it after `{command}`, or unset it")


def describe_unknown(unknown: list[str], taken: list[str], command: str) -> str:
    """Return the error for variables that no goal takes, with the names that were perhaps meant."""
    for name in unknown:
        if name in ("API_TOKEN", "HF_TOKEN") or name.startswith("VAE_"):
            return f"{name} is an environment variable: write it before make, as in `{name}=... {command}`"
    close = [match for name in unknown for match in difflib.get_close_matches(name.upper(), taken, 1)]
    meant = f" (did you mean {' '.join(close)}?)" if close else ""
    takes = f"; it takes {' '.join(taken)}" if taken else ""
    return f"`{command}` takes no {' '.join(unknown)}{meant}{takes}"


def options(target: str, variables: dict[str, str]) -> list[str]:
    """Return the options of the target's command: --min-replica="$MIN_REPLICA" for a value, --yes for YES=1."""
    result = []
    for name in TAKES.get(target, "").split():
        option = f"--{name.lower().replace('_', '-')}"
        value = variables.get(name, "")
        if name in SWITCHES:
            result += [option] if value == "1" else []
        elif value:
            result.append(f'{option}="${name}"')
    return result


def main(target: str, goals: str, *variables: str) -> None:
    values = dict(variable.split("=", 1) for variable in variables)
    try:
        check(goals.split(), values)
    except ValueError as error:
        print("error:", error)
    else:
        print("ok", *options(target, values))


if __name__ == "__main__":
    main(*sys.argv[1:])
