"""Token buckets against a clock that the test turns."""

import pytest

from dspark.common.errors import UserError
from dspark.server.errors import ApiError
from dspark.server.keys import ApiKey, find_keys
from dspark.server.rates import Account, Rates, duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_requests_refill_evenly(clock):
    account = Account(Rates(requests=60), clock)
    for _ in range(60):
        account.take_request()
    with pytest.raises(ApiError, match="60 requests per minute") as refused:
        account.take_request()
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "1"
    assert account.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now = 1.0
    account.take_request()
    with pytest.raises(ApiError):
        account.take_request()
    clock.now = 1000.0  # never more than a minute's worth
    for _ in range(60):
        account.take_request()
    with pytest.raises(ApiError):
        account.take_request()


def test_tokens_are_set_aside_and_settled(clock):
    account = Account(Rates(tokens=100), clock)
    assert account.reserve(70) == 70
    with pytest.raises(ApiError) as refused:
        account.reserve(40)
    assert refused.value.headers["Retry-After"] == "6"  # 10 tokens are missing, at 100 a minute
    account.settle(70, used=20)
    assert account.headers["x-ratelimit-remaining-tokens"] == "80"
    account.settle(account.reserve(40), used=40)
    assert account.headers["x-ratelimit-remaining-tokens"] == "40"


def test_a_request_larger_than_a_minute_waits_for_a_full_bucket_and_leaves_a_debt(clock):
    account = Account(Rates(tokens=100), clock)
    reserved = account.reserve(500)
    assert reserved == 100
    account.settle(reserved, used=130)
    assert account.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now = 18.0  # the debt of 30 is paid
    assert account.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now = 78.0
    assert account.reserve(500) == 100


def test_without_limits_nothing_is_counted():
    account = Account(Rates())
    account.take_request()
    assert account.reserve(10**9) == 0 and account.headers == {}


def test_durations_are_written_as_openai_writes_them():
    assert [duration(s) for s in (0, 0.0001, 0.35, 1, 1.5, 59.2, 61)] == [
        "0ms",
        "1ms",
        "350ms",
        "1s",
        "2s",
        "1m0s",
        "1m1s",
    ]


def test_key_lines(tmp_path, monkeypatch):
    key = ApiKey.parse("secret name=alice tokens-per-minute=7", Rates(requests=5, tokens=6))
    assert (key.name, key.rates) == ("alice", Rates(requests=5, tokens=7))
    assert ApiKey.parse("secret").name == key.digest.hex()[:8] and "secret" not in repr(key)
    for bad in ("s tokens-per-minute=x", "s tokens-per-minute=0", "s name=a/b", "s color=red", "s name"):
        with pytest.raises(UserError):
            ApiKey.parse(bad)
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst name=a\n\n second \n")
    monkeypatch.setenv("DSPARK_API_KEYS", "third,fourth requests-per-minute=1")
    assert find_keys(["zero"], file) == ["zero", "third", "fourth requests-per-minute=1", "first name=a", "second"]
