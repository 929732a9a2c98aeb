"""One trainer, two engines of two ranks each: both take a push, or neither does.

The engines are vLLM servers, as on two machines. Weights go from the trainer's memory over a gloo group for
each engine (`gloo_transfer.py`), in chunks, while both serve; no file is written. Then the engines finish
together: their ranks vote in a store that the trainer holds. Shown are a good push; one whose last chunk does
not reach one engine; one that one engine cannot load; and one during which a process of an engine is killed.
After each, both engines (or the one that is left) answer as the last good weights. At the end an engine is
started on these, and answers the same, with the same digests.

With `--folder` the weights go through a folder that both engines can read instead, by the command
`reload-plugin push CHECKPOINT URL URL`.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import checkpoints
import engine

engine.prepare(plugin=True)

import gloo_transfer  # noqa: E402 - after the environment is set
import httpx  # noqa: E402
import torch  # noqa: E402

from reload_plugin.ranks.joint import JointReload  # noqa: E402

HOST = "127.0.0.1"
RANKS = 2
CHUNK = 64 << 10  # bytes
SECONDS = 60.0  # for an answer, or for an engine that is ready to be joined by the other
Weights = dict[str, torch.Tensor]


class Engine:
    """A vLLM server of two ranks, and the trainer's group with it."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.sender: gloo_transfer.Sender | None = None
        self._asking = ThreadPoolExecutor(1)

    def post(self, route: str, body: dict | None = None) -> dict:
        """The server's answer; RuntimeError with its reason where it failed."""
        try:
            answer = httpx.post(f"{self.url}/{route}", json=body, timeout=2 * SECONDS)
        except httpx.HTTPError as error:
            raise RuntimeError(f"{self.name} does not answer: {error}") from error
        if answer.is_error:
            raise RuntimeError(f"{self.name}: {answer.text}")
        return answer.json() if answer.content else {}

    def call(self, method: str, **arguments: object) -> list:
        """What a method of each rank's worker returned."""
        return self.post("collective_rpc", {"method": method, "kwargs": arguments})["results"]

    def join(self) -> None:
        """Make a group with the engine, unless there is one."""
        if self.sender is None:
            self.sender = gloo_transfer.Sender(RANKS)
            init_info = self.sender.init_info(HOST)
            joining = self._asking.submit(self.post, "init_weight_transfer_engine", {"init_info": init_info})
            self.sender.open()
            joining.result()

    def send(self, chunk: Weights) -> None:
        """Send some weights, which the engine stages beside those it serves."""
        kinds = {
            "names": list(chunk),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in chunk.values()],
            "shapes": [list(tensor.shape) for tensor in chunk.values()],
        }
        loading: Future = self._asking.submit(self.post, "update_weights", {"update_info": kinds})
        try:
            self.sender.send(list(chunk.values()), loading.done)
        except (RuntimeError, ConnectionError) as error:
            self.sender = None  # who knows what is still on its way in this group
            loading.result()  # the engine's own reason, if it has one
            raise RuntimeError(f"{self.name}: {error}") from error
        loading.result()

    def answers(self) -> list:
        """Greedy tokens and logprobs of the engine's answers to `engine.PROMPTS`."""
        asked = {"model": "policy", "max_tokens": 8, "temperature": 0, "logprobs": 5, "ignore_eos": True}
        found = []
        for prompt in engine.PROMPTS:
            choice = self.post("v1/completions", asked | {"prompt": prompt})["choices"][0]["logprobs"]
            found.append([choice["tokens"], choice["token_logprobs"], choice["top_logprobs"]])
        return found

    def digests(self) -> list[str]:
        """Of what each rank's kernels read."""
        return [state["digest"] for state in self.call("reload_status")]


def push(engines: list[Engine], chunks_for: Callable[[Engine], list[Weights]]) -> None:
    """Push to all engines, chunk by chunk; all of them take the weights, or none does.

    Raises:
        RuntimeError: one failed, and says why; all serve what they served before.

    """
    together = JointReload({one.name: RANKS for one in engines}, SECONDS)

    def finish(one: Engine) -> None:
        try:
            one.call("finish_together", together=together.option(one.name, HOST))
        except RuntimeError as error:
            together.refuse(one.name, error)  # if it did not come to the vote
            raise

    try:
        each(engines, Engine.join)
        each(engines, lambda one: one.post("start_weight_update"))
        each(engines, lambda one: [one.send(chunk) for chunk in chunks_for(one)])
        each(engines, finish)
    except RuntimeError:
        for one in engines:
            with contextlib.suppress(RuntimeError):  # one that is gone has nothing to end
                one.call("abort_weight_update")
        raise


def each(engines: list[Engine], do: Callable[[Engine], object]) -> None:
    """Do it with all engines at once. Raises what the first of them raised, when all have ended."""
    with ThreadPoolExecutor(len(engines)) as pool:
        failed = [f.exception() for f in [pool.submit(do, one) for one in engines]]
    errors = [error for error in failed if error is not None]
    if errors:
        raise RuntimeError(" | ".join(map(str, errors)))


def in_chunks(weights: Weights) -> list[Weights]:
    """The weights in chunks of about `CHUNK` bytes."""
    chunks, size = [{}], 0
    for name, tensor in weights.items():
        if chunks[-1] and size + tensor.nbytes > CHUNK:
            chunks.append({})
            size = 0
        chunks[-1][name] = tensor
        size += tensor.nbytes
    return chunks


# -- the servers -----------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(folder: Path, names: tuple[str, ...], logs: Path) -> Iterator[list[Engine]]:
    """Start servers on a checkpoint, at the same time; stop them at the end."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # the routes of weight transfer
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # there are more processes here than cores
        "TORCHDYNAMO_DISABLE": "1",  # compiling vLLM's sampler would take longer than all the rest
    }
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_process(folder, name, variables, logs)) for name in names]
        for one, process, log in started:
            _wait_until_healthy(one, process, log)
        yield [one for one, _, _ in started]


@contextlib.contextmanager
def _process(folder: Path, name: str, variables: dict, logs: Path) -> Iterator[tuple]:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    # `vllm serve` looks for a distribution named `vllm`, and the build for CPUs has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", HOST, "--port", str(port), "--served-model-name", "policy", "--enforce-eager"]
    command += ["--dtype", "bfloat16", "--max-model-len", "96", "--max-num-seqs", "4"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--no-enable-prefix-caching"]
    command += ["--tensor-parallel-size", str(RANKS), "--distributed-executor-backend", "mp"]
    command += ["--worker-extension-cls", "gloo_transfer.Worker"]
    command += ["--weight-transfer-config", json.dumps({"backend": "gloo"})]
    log = logs / f"{name.replace(' ', '-')}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables, start_new_session=True)
        try:
            yield Engine(name, f"http://{HOST}:{port}"), process, log
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):  # what is left of its session
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(one: Engine, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{one.url}/health", timeout=5).is_success:
                return
        time.sleep(0.3)
    raise RuntimeError(f"{one.name} did not start:\n{log.read_text()[-4000:]}")


# -- what is shown ---------------------------------------------------------------------------------


class Show:
    """Prints a line for each step, and knows whether all went as it should."""

    def __init__(self) -> None:
        self.right = True

    def check(self, what: str, as_it_should: bool) -> None:
        """A line that ends in yes or NO."""
        self.right &= as_it_should
        print(f"{what}: {'yes' if as_it_should else 'NO'}", flush=True)

    def refused(self, what: str, push: Callable[[], object], says: str) -> None:
        """A push that has to fail, for a reason with `says` in it."""
        started = time.monotonic()
        try:
            push()
            said = "nothing: it was taken"
        except RuntimeError as error:
            said = " ".join(str(error).split())
        seconds = time.monotonic() - started
        self.check(f"{what}: refused after {seconds:.1f} s, and named", says in said)
        if says not in said:
            print(said)


def over_gloo(engines: list[Engine], good: Path, bad: Path, show: Show) -> list:
    """Push from the trainer's memory; returns what the engines answer at the end."""
    first, second = engines
    started, chunks = [one.answers() for one in engines], in_chunks(weights_of(good))
    push(engines, lambda _: chunks)
    print(f"pushed {len(chunks)} chunks to {len(engines)} engines of {RANKS} ranks, over gloo")
    served = first.answers()
    show.check("both answer alike, and not as before", second.answers() == served not in started)

    def lost(one: Engine) -> list[Weights]:
        return in_chunks(weights_of(bad))[: -1 if one is second else None]

    def misshapen(one: Engine) -> list[Weights]:
        *most, last = in_chunks(weights_of(bad))
        cut = {name: tensor[:-1] for name, tensor in last.items()}
        return [*most, cut if one is second else last]

    def killed(one: Engine) -> list[Weights]:
        found = in_chunks(weights_of(bad))
        return Killing(found, pid) if one is second else found

    show.refused(
        "engine 2 lacks a chunk", lambda: push(engines, lost), "engine 2 rank 0: MissingWeightsError"
    )
    show.check("both answer as before", [one.answers() for one in engines] == [served] * 2)
    show.refused("engine 2 cannot load a chunk", lambda: push(engines, misshapen), "engine 2: ")
    show.check("both answer as before", [one.answers() for one in engines] == [served] * 2)
    push(engines, lambda _: chunks)
    show.check("the next push is taken by both", [one.answers() for one in engines] == [served] * 2)
    pid = int(second.call("process_id")[1])
    show.refused("a process of engine 2 is killed", lambda: push(engines, killed), "engine 2")
    return served


class Killing(list):
    """Chunks between which a process is killed."""

    def __init__(self, chunks: list[Weights], pid: int) -> None:
        super().__init__(chunks)
        self._pid = pid

    def __iter__(self) -> Iterator[Weights]:
        for number, chunk in enumerate(super().__iter__()):
            if number == len(self) // 2:
                os.kill(self._pid, signal.SIGKILL)
            yield chunk


def through_a_folder(engines: list[Engine], good: Path, bad: Path, show: Show) -> list:
    """The same through files, by the command line."""
    first, second = engines
    started = [one.answers() for one in engines]
    print(push_folder(engines, good), end="")
    served = first.answers()
    show.check("both answer alike, and not as before", second.answers() == served not in started)
    os.kill(int(second.call("process_id")[1]), signal.SIGKILL)
    show.refused("a process of engine 2 is killed", lambda: push_folder(engines, bad), second.url)
    return served


def push_folder(engines: list[Engine], folder: Path) -> str:
    """`reload-plugin push`; what it printed, or RuntimeError with that."""
    command = [sys.executable, "-m", "reload_plugin.cli", "push", str(folder), *(one.url for one in engines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def weights_of(folder: Path) -> Weights:
    """The trainer's weights after a step, by checkpoint name."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write(folder: Path, seed: int) -> Path:
    """A random model that stands for what the trainer has after a step, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    checkpoints.write("dense", seed, folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)
    return folder


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", action="store_true", help="through a shared folder, not over gloo")
    parser.add_argument("--logs", type=Path, help="folder for what the servers print")
    options = parser.parse_args()
    show = Show()
    with tempfile.TemporaryDirectory() as name:
        root, logs = Path(name), options.logs or Path(name)
        base, good, bad = (write(root / f"step-{step}", step) for step in range(3))
        with servers(base, ("engine 1", "engine 2"), logs) as engines:
            run = through_a_folder if options.folder else over_gloo
            served = run(engines, good, bad, show)
            show.check("engine 1 answers as before", engines[0].answers() == served)
            digests = engines[0].digests()
        with servers(good, ("a cold start",), logs) as (cold,):
            show.check("an engine started on these weights answers the same", cold.answers() == served)
            show.check("and its ranks have the same digests", cold.digests() == digests)
    return int(not show.right)


if __name__ == "__main__":
    sys.exit(main())
