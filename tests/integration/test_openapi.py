"""The OpenAPI document is true: whatever fits it, or nearly does, gets an answer that it describes, and never a 5xx.

For a longer run by hand: DSPARK_OPENAPI_EXAMPLES=500 python -m pytest tests/integration/test_openapi.py
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import serving, tiny_core

from dspark.server.service import ServerConfig

EXAMPLES = int(os.environ.get("DSPARK_OPENAPI_EXAMPLES", "8"))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(tiny_pair):
    config = ServerConfig(name="tiny", most_body_bytes=200_000, most_prompt_tokens=300)
    with serving(tiny_core(tiny_pair), config) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for endpoint in ("completions", "chat/completions"):  # or nearly every request asks for another model
            fields = schema.raw_schema["paths"][f"/v1/{endpoint}"]["post"]["requestBody"]["content"]["application/json"]
            name = fields["schema"]["$ref"].rpartition("/")[2]
            schema.raw_schema["components"]["schemas"][name]["properties"]["model"] = {"const": "tiny"}
        own = schema.raw_schema["components"]["schemas"]["Extensions"]["properties"]
        own["deadline_ms"] = {"enum": [None, 60_000]}  # a request for an answer within 1 ms is rightly a 504
        yield schema


def test_answers_are_what_the_document_says(document):
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def ask(case):
            case.call_and_validate(checks=CHECKS, timeout=60)

        ask()


def test_what_the_document_says(document):
    paths = document.raw_schema["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/metrics"} <= set(paths)
    said = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(said) == {"200", "4XX", "5XX"} and set(said["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
