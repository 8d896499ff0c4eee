"""Whether every rule and every panel finds data: a real Prometheus scrapes a server under load, and is asked them all.

    dspark serve --planner joint &
    python deploy/check_prometheus.py http://127.0.0.1:8000

Needs `prometheus` and `promtool` on the path. Alerts are silent where all is well, so their conditions are asked with
`bool`: 0 or 1, but something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

import yaml

DEPLOY = Path(__file__).parent
RULES = DEPLOY / "prometheus" / "rules.yml"
VARIABLES = {"$instance": ".*", "$__rate_interval": "1m"}
COMPARISON = re.compile(r" (==|!=|<=|>=|<|>) (?!bool)")


def rule_queries() -> dict[str, str]:
    """By name, every rule's expression; of an alert with its comparisons answered by 0 or 1."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    alerts = {rule["alert"]: COMPARISON.sub(r" \1 bool ", rule["expr"]) for rule in rules if "alert" in rule}
    return recorded | alerts


def panel_queries() -> dict[str, str]:
    """By dashboard, panel and letter, every query with its variables filled in."""
    found = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for name, value in VARIABLES.items():
                    query = query.replace(name, value)
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = query
    return found


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextlib.contextmanager
def prometheus(target: str) -> Iterator[str]:
    """A Prometheus with our rules that scrapes `target` (host:port) every second; yields its URL."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(RULES, directory)
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        job = config["scrape_configs"][0]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [target]}]
        Path(directory, "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, f"--web.listen-address={address}", "--log.level=error"], **quiet)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def load(server: str, key: str = "") -> Iterator[None]:
    """Texts, streamed and not, and a request that is wrong, one after another until the context ends."""
    ended = threading.Event()

    def ask(body: dict[str, object]) -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = Request(f"{server}/v1/completions", json.dumps(body).encode(), headers)
        with contextlib.suppress(URLError, OSError), urlopen(request, timeout=60) as answer:
            answer.read()

    def work(number: int) -> None:
        prompt = "def add(a, b):\n    return"
        while not ended.is_set():
            ask({"prompt": prompt, "max_tokens": 48, "temperature": 0, "stream": number % 2 == 0, "ignore_eos": True})
            ask({"prompt": prompt, "max_tokens": 0})
            ended.wait(0.05)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def series(url: str, query: str) -> int:
    """How many series a query has now whose value is a number. Raises RuntimeError for one that is malformed."""
    try:
        with urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}", timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
    except URLError as error:
        if getattr(error, "code", None) in (400, 422):
            raise RuntimeError(f"{query}: {error}") from error
        return 0  # it does not listen yet
    return sum(one["value"][1] != "NaN" for one in result)


def empty_queries(server: str, *, seconds: float, key: str = "") -> dict[str, str]:
    """Load a server until every query has had data, `seconds` at most; returns those that never had."""
    left = rule_queries() | panel_queries()
    ends = time.monotonic() + seconds
    with prometheus(urlsplit(server).netloc) as url, load(server, key):
        while left and time.monotonic() < ends:
            time.sleep(1.0)
            left = {name: query for name, query in left.items() if not series(url, query)}
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="as in http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="an API key")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to wait for data")
    asked = parser.parse_args()
    for check in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.with_name("rules_test.yml"))]):
        subprocess.run(["promtool", *check], check=True)
    total = len(rule_queries() | panel_queries())
    empty = empty_queries(asked.server, seconds=asked.seconds, key=asked.key)
    for name, query in empty.items():
        print(f"no data: {name}\n    {query}")
    print(f"{total - len(empty)} of {total} queries returned data")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
