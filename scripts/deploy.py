"""Puts VAEs onto Hugging Face Inference Endpoints: `make deploy MODEL=flux`.

Needs no torch. `docs/deploying.md` tells what it does and what it costs; the parts are in `deployment/`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

# The storage's client tries for minutes without a word by default: here it gives up within half a minute.
os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "1s")
os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "30s")

import typer
from huggingface_hub import get_token
from huggingface_hub.utils import logging as hub_logging
from rich.markup import escape

from handlers import MODELS
from scripts.deployment import hardware
from scripts.deployment.account import PERMISSIONS, Account, open_account
from scripts.deployment.console import DeployError, make_table, megabytes, note, out, print_wide, say
from scripts.deployment.endpoint import AGAIN, PENDING_PER_REPLICA, READY, Endpoint, Interrupted
from scripts.deployment.hardware import describe_price, dollars
from scripts.deployment.plan import CALLERS, FRAMEWORK, TASK, Plan, cannot_run, default_name, find_models, is_shipped
from scripts.deployment.repository import Repository, describe_files
from scripts.deployment.smoke import is_hugging_face, smoke_test
from scripts.deployment.snippets import diffusers_snippet, token_snippet

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

ModelOption = Annotated[str | None, typer.Option(help=f"Key of the model, or a,b,c: {', '.join(MODELS)}.")]
NamespaceOption = Annotated[str | None, typer.Option(help="User or organization; default: the token's user.")]
NameOption = Annotated[str | None, typer.Option(help="Name of endpoint and repository; default: remote-vae-MODEL.")]
TimeoutOption = Annotated[float, typer.Option(help="Minutes to wait for the endpoint.")]
KeepOption = Annotated[bool, typer.Option("--keep", help="Leave an endpoint running that failed; else it is paused.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Registers a subcommand. Its failures end it with one line on standard error."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        hub_logging.set_verbosity_error()
        try:
            return function(*args, **kwargs)
        except DeployError as error:
            message, status = f"error: {error}", 1
        except Interrupted as stop:
            message, status = f"stopped: {stop}", INTERRUPTED
        except KeyboardInterrupt:
            message, status = "stopped", INTERRUPTED
        gc.collect()  # a progress bar that the failure left open ends its line here
        fail(message, status)

    return app.command()(run)


def fail(message: str, status: int) -> NoReturn:
    token = get_token()
    note(message.replace(token, "***") if token else message)
    raise typer.Exit(status)


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{left}; {AGAIN}") from None


@command
def deploy(
    context: typer.Context,
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    instance: Annotated[str | None, typer.Option(help="Instance type; default: the model's own.")] = None,
    size: Annotated[str, typer.Option(help="Instance size.")] = "x1",
    vendor: Annotated[str, typer.Option(help="Cloud.")] = "aws",
    region: Annotated[
        str, typer.Option(help='The cloud\'s region, or "auto": the nearest that has one.')
    ] = "us-east-1",
    access: Annotated[str, typer.Option(help=f"Who may call it: {', '.join(CALLERS)}.")] = "authenticated",
    min_replica: Annotated[int, typer.Option(help="Replicas that always run; 0 lets it scale to zero.")] = 0,
    max_replica: Annotated[int, typer.Option(help="Replicas at most.")] = 1,
    scale_to_zero: Annotated[int, typer.Option(help="Minutes without a request before it scales to zero.")] = 15,
    weights: Annotated[str | None, typer.Option(help='Folder of the weights, or "hub" to upload none.')] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the checkpoint; default: what is deployed.")] = None,
    timeout: TimeoutOption = 30,
    keep: KeepOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; no token, no network.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every published model, one endpoint each.")] = False,
) -> None:
    """Create or update the endpoint of one model, or of several, wait for it, try it."""
    asked = {key: value for key, value in context.params.items() if key in Plan.__dataclass_fields__}
    if every:
        deploy_all(asked, timeout, keep, dry_run)
        return
    plan = Plan.of(model, **asked)
    if dry_run:
        show_plan(plan)
        return
    with interruptible("nothing was changed"):
        account = open_account(namespace, needed_for(plan))
    plan, endpoint = deploy_plan(account, plan, timeout, keep)
    show_calling(plan, endpoint)


def needed_for(plan: Plan) -> list[str]:
    """The token's permissions: anyone may call a public endpoint."""
    return [one for one in PERMISSIONS if plan.access != "public" or not one.endswith("infer.write")]


def deploy_all(asked: dict[str, Any], timeout: float, keep: bool, dry_run: bool) -> None:
    """One by one. Ends with a table, whatever happens."""
    for reason in filter(None, map(cannot_run, MODELS)):
        note(reason)
    published = [key for key, handler in MODELS.items() if not is_shipped(handler) and not cannot_run(key)]
    plans = [Plan.of(key, **asked) for key in published]
    if dry_run:
        for plan in plans:
            show_plan(plan)
    prices = [plan.price for plan in plans]
    if None not in prices:
        say(f"{len(plans)} endpoints: {describe_price(sum(prices))} while a replica of each starts or runs")
    if dry_run:
        return
    account = open_account(asked["namespace"], needed_for(plans[0]))
    rows: dict[str, tuple[str, str, str]] = {plan.model: ("not reached", "", "") for plan in plans}
    failed = 0
    try:
        for plan in plans:
            try:
                _, endpoint = deploy_plan(account, plan, timeout, keep)
                rows[plan.model] = (endpoint.state, hourly(endpoint.price), endpoint.url or "")
            except DeployError as error:
                failed += 1
                note(f"error: {error}")
                rows[plan.model] = ("failed", "", str(error))
            except Interrupted as stop:
                rows[plan.model] = ("stopped", "", str(stop))
                raise
    finally:
        table = make_table("model", "state", "per replica", "URL, or what went wrong")
        for key, row in rows.items():
            table.add_row(key, *map(escape, row))
        print_wide(table)
    if failed:
        raise DeployError(f"{failed} of {len(plans)} models failed; `make deploy-all` again goes on with them")


def deploy_plan(account: Account, plan: Plan, timeout: float, keep: bool) -> tuple[Plan, Endpoint]:
    """The whole way. Everything that can refuse is asked before the first change; a second run changes nothing."""
    say(f"Deploying {plan.model} as {account.namespace}/{plan.name}")
    with interruptible("nothing was changed"):
        endpoint = Endpoint.find(account, plan.name)
        endpoint.check_ours(plan.models)
        endpoint.check_fixed(plan)
    left = ["nothing was changed"]
    with endpoint.nothing_bills_unseen(plan.variables, keep, left):
        repository = Repository(account, plan.name)
        repository.check_ours(plan.models)
        weights = repository.find_weights(plan)
        kept = endpoint.region if endpoint.exists else None
        plan = plan.with_hardware(account.hardware, kept, endpoint.holds(plan))
        say(f"{plan.instance} {plan.size} in {plan.vendor} {plan.region}: {describe_price(plan.price)} at work")

        say(f"Repository {repository.page}" + ("" if repository.exists else ", new and private"))
        left[:] = [f"the repository {repository.id} stays, it may be incomplete and costs nothing"]
        repository.create()
        revision = repository.upload(plan, weights)

        say(f"Endpoint {endpoint.page}")
        left.clear()
        # A container that has to fetch gated weights itself needs the token; the API keeps it as a secret.
        gated = plan.weights == "hub" and any(info.gated for info in weights.values())
        endpoint.deploy(plan, repository.id, revision, account.token if gated else None)
        endpoint.wait(timeout, plan.variables)
        endpoint.check_type(plan)

        say("Smoke test")
        for key in plan.models:
            url = endpoint.url if len(plan.models) == 1 else f"{endpoint.url}/{key}"
            say(f"  {smoke_test(url, account.token)}")
    return plan, endpoint


@command
def endpoints(namespace: NamespaceOption = None) -> None:
    """List this project's endpoints."""
    account = open_account(namespace)
    found = Endpoint.find_all(account)
    if not found:
        say(f"{account.namespace} has no endpoint of this project; `make deploy MODEL=tiny` makes a first one")
        return
    table = make_table("name", "model", "state", "instance", "replicas", "access", "an hour", "up at most", "URL")
    for one in found:
        row = (one.name, ",".join(one.models), one.state, " ".join(one.instance), one.replicas, one.access)
        table.add_row(*row, hourly(one.price), one.spent, one.url or "")
    print_wide(table)
    say(
        "paused and scaledToZero cost nothing; `make pause-all` pauses all. Up: since the last change, as the API tells"
    )


@command
def smoke(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    url: Annotated[str | None, typer.Option(help="Address of any endpoint or server, instead of a model.")] = None,
) -> None:
    """Encode and decode a small picture on a live endpoint."""
    if url:
        say(str(smoke_test(url, get_token() if is_hugging_face(url) else None)))
        return
    account, endpoint = find_endpoint(model, namespace, name)
    if endpoint.state == "paused":
        raise DeployError(
            f"the endpoint {endpoint.name} is paused: it answers nothing until `make resume MODEL={model}`"
        )
    if endpoint.state not in READY or not endpoint.url:
        raise DeployError(f"the endpoint {endpoint.name} is {endpoint.state}: {endpoint.message} ({endpoint.page})")
    for path in [f"/{key}" for key in endpoint.models] if len(endpoint.models) > 1 else [""]:
        say(f"{endpoint.url}{path}: {smoke_test(endpoint.url + path, account.token)}")


@command
def pause(model: ModelOption = None, namespace: NamespaceOption = None, name: NameOption = None) -> None:
    """Stop an endpoint, and with it its cost, until `resume`."""
    _, endpoint = find_endpoint(model, namespace, name)
    pause_one(endpoint)


@command
def pause_all(namespace: NamespaceOption = None) -> None:
    """Stop every endpoint of this project, whatever becomes of one of them."""
    account = open_account(namespace)
    failed = []
    for endpoint in Endpoint.find_all(account):
        try:
            pause_one(endpoint)
        except DeployError as error:
            note(f"error: {error}")
            failed.append(f"{endpoint.name} ({endpoint.page})")
    if failed:
        raise DeployError(f"MAY BE RUNNING, and cost: {', '.join(failed)}")
    say(f"nothing of this project costs anything in {account.namespace}")


def pause_one(endpoint: Endpoint) -> None:
    if endpoint.state != "paused":
        endpoint.pause()
    say(f"{endpoint.name} is {endpoint.state}: it costs nothing and answers nothing until `make resume`")


@command
def resume(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    timeout: TimeoutOption = 30,
    keep: KeepOption = False,
) -> None:
    """Start a paused endpoint again and wait for it."""
    _, endpoint = find_endpoint(model, namespace, name)
    with endpoint.nothing_bills_unseen(f"MODEL={model}", keep, []):
        if endpoint.state == "paused":
            endpoint.resume()
        endpoint.wait(timeout, f"MODEL={model}")
    say(f"{endpoint.name} is {endpoint.state}: {endpoint.url}, {describe_price(endpoint.price)}")


@command
def undeploy(
    model: ModelOption = None,
    namespace: NamespaceOption = None,
    name: NameOption = None,
    delete_repo: Annotated[bool, typer.Option("--delete-repo", help="Delete the repository on the Hub too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an endpoint, wait until it is gone, and delete its repository where asked to."""
    models = find_models(model)
    account = open_account(namespace)
    name = name or default_name(*models)
    endpoint = Endpoint.find(account, name)
    endpoint.check_ours(models)
    repository = Repository(account, name) if delete_repo else None
    if repository:
        repository.check_ours(models)
    doomed = [f"the endpoint {name}"] if endpoint.exists else []
    doomed += [f"the repository {repository.id}"] if repository and repository.exists else []
    if not doomed:
        say(f"there is no {name} in {account.namespace}: nothing to delete")
        return
    if not yes and not confirm(f"Delete {' and '.join(doomed)}?"):
        raise DeployError("nothing was deleted; YES=1 deletes without asking")
    with interruptible(f"{' and '.join(doomed)} may be there yet, and cost; `make endpoints` shows it"):
        if endpoint.exists:
            endpoint.delete()
        if repository and repository.exists:
            repository.delete()
    say(f"deleted {' and '.join(doomed)}")
    if not delete_repo:
        say(f"the repository {account.namespace}/{name} stays, at no cost; DELETE_REPO=1 deletes it too")


def confirm(question: str) -> bool:
    """Whether the user says yes; no where there is nobody to ask."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        note("")
        return False


def find_endpoint(model: str | None, namespace: str | None, name: str | None) -> tuple[Account, Endpoint]:
    models = find_models(model)
    account = open_account(namespace)
    endpoint = Endpoint.find(account, name or default_name(*models))
    if not endpoint.exists:
        raise DeployError(
            f"there is no endpoint {endpoint.name} in {account.namespace}; `make endpoints` lists what there is, "
            f"`make deploy MODEL={model}` makes it"
        )
    endpoint.check_ours(models)
    return account, endpoint


def show_plan(plan: Plan) -> None:
    owner = plan.namespace or "<your account>"
    say(f"Plan for MODEL={plan.model}; nothing is changed, no token is needed\n")
    say(f"1. The private repository https://huggingface.co/{owner}/{plan.name} gets these files")
    table = make_table("file", "size")
    table.columns[1].justify = "right"
    listed = describe_files(plan)
    for path, size in listed:
        table.add_row(path, megabytes(size) if size is not None else "?")
    table.add_row(f"{len(listed)} files", megabytes(sum(size or 0 for _, size in listed)))
    out.print(table)
    for one in plan.sources:
        if one.kind == "checkpoint":
            say(f"   The weights are copied from {one.origin}, on the Hub; their sizes here are about right.")
        if one.kind == "hub":
            say(f"   No weights: the endpoint fetches them from {one.origin} at every start.")
        if one.kind != "folder":
            say(f"   Their licence: {one.handler.license}, {one.license_link}")
    say("\n2. The endpoint is created from that commit, or updated where it exists")
    table = make_table("setting", "value", show_header=False)
    replicas = f"{plan.min_replica} to {plan.max_replica}"
    if plan.max_replica > 1:
        replicas += f", one more at {PENDING_PER_REPLICA} pending requests a replica"
    asleep = f"after {plan.scale_to_zero} minutes without a request" if plan.scale_to_zero else "never"
    table.add_row("name", plan.name)
    table.add_row("instance", f"{plan.instance} {plan.size}, {plan.vendor} {plan.region}")
    table.add_row("access", f"{plan.access}: {CALLERS[plan.access]}")
    table.add_row("replicas", replicas)
    table.add_row("scale to zero", asleep)
    table.add_row("container", f"the stock Inference Toolkit, task {TASK}, framework {FRAMEWORK}")
    table.add_row("tags", ", ".join(plan.tags))
    out.print(table)
    say(f"\n3. What it costs, by the list of {hardware.AS_OF}; deploying asks for today's prices, quota and regions")
    for line in plan.cost:
        say(f"   {line}")
    say("\n4. It waits until the endpoint is up, sends a small picture through it and prints its URL")
    say(f"\n`make pause {plan.variables}` stops the cost; `make undeploy {plan.variables}` removes it.")


def show_calling(plan: Plan, endpoint: Endpoint) -> None:
    say(f"\n{endpoint.url}" + "".join(f"\n{endpoint.url}/{key}" for key in plan.models[1:]))
    for line in plan.cost:
        say(f"  {line}")
    say(f"  `make pause {plan.variables}` stops the cost; `make undeploy {plan.variables}` removes it")
    first = plan.handlers[0]
    if plan.access == "public":
        say("\nCalling it with diffusers:\n")
        say(diffusers_snippet(first, endpoint.url))
        return
    say(f"\nACCESS={plan.access}: {CALLERS[plan.access]}.")
    say("`remote_decode` of diffusers sends no token; this does:\n")
    say(token_snippet(first, endpoint.url))
    say("With ACCESS=public (a new NAME=..., or after `make undeploy`) this works, for anyone who knows the URL:\n")
    say(diffusers_snippet(first, "URL"))


def hourly(price: float | None) -> str:
    return f"{dollars(price)}/h" if price is not None else "?"


if __name__ == "__main__":
    app()
