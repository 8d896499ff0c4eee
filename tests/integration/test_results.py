"""Where answers are kept: the file and the real Redis, held to the same promises."""

import asyncio
import sqlite3
import stat

import pytest
from redis_server import running_redis

from dspark.common.errors import UserError
from dspark.server.errors import ApiError
from dspark.server.redis_results import RedisResults
from dspark.server.results import MEMORY, Busy, FileResults, Kept, open_results, usual_file

ANSWER = Kept("print", 200, "text/event-stream; charset=utf-8", b"data: \xff\n{}\n\n")


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["memory", "file", "redis"])
def opened(request, tmp_path):
    """A way to open the same store again and again."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        return lambda seconds=60.0: RedisResults(url, seconds=seconds)
    path = MEMORY if request.param == "memory" else tmp_path / "answers"
    return lambda seconds=60.0: FileResults(path, seconds=seconds, most_bytes=1000)


def test_an_answer_comes_back_whole(opened, request):
    async def main():
        results, key = opened(), request.node.name
        assert await results.begin(key, "print") is None
        await results.keep(key, ANSWER)
        assert await results.begin(key, "other") == ANSWER
        assert await results.begin(key + "2", "print") is None
        await results.release(key + "2", "print")
        assert await results.begin(key + "2", "different") is None  # nothing is left of what was released
        await results.close()

    asyncio.run(main())


def test_answers_expire(opened, request):
    async def main():
        results, key = opened(seconds=0.15), request.node.name
        await results.begin(key, "print")
        await results.keep(key, ANSWER)
        assert await results.begin(key, "print") == ANSWER
        await asyncio.sleep(0.2)
        assert await results.begin(key, "print") is None
        await results.close()

    asyncio.run(main())


def test_a_file_outlives_its_server_and_is_for_one_at_a_time(tmp_path):
    path = tmp_path / "deep" / "answers"

    async def write():
        results = FileResults(path, seconds=60, most_bytes=1000)
        await results.begin("key", "print")
        await results.keep("key", ANSWER)
        with pytest.raises(UserError, match="another server has it"):
            FileResults(path, seconds=60, most_bytes=1000)
        await results.close()

    async def read():
        results = FileResults(path, seconds=60, most_bytes=1000)
        assert await results.begin("key", "print") == ANSWER
        await results.close()

    asyncio.run(write())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    asyncio.run(read())


def test_the_oldest_answers_make_room(tmp_path):
    async def main():
        results = FileResults(tmp_path / "answers", seconds=60, most_bytes=100)
        for key in range(5):
            await results.keep(str(key), Kept("p", 200, "t", bytes(30)))
        found = [await results.begin(str(key), "p") is not None for key in range(5)]
        assert found == [False, False, True, True, True]
        await results.keep("4", Kept("p", 200, "t", bytes(40)))  # in place of its older self
        assert [await results.begin(str(key), "p") is not None for key in range(5)] == [False, False, True, True, True]
        await results.close()
        again = FileResults(tmp_path / "answers", seconds=60, most_bytes=100)
        await again.keep("5", Kept("p", 200, "t", bytes(70)))
        assert [await again.begin(str(key), "p") is not None for key in range(6)] == [*[False] * 5, True]
        await again.close()

    asyncio.run(main())


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "text").write_text("not a database" * 100)
    with sqlite3.connect(tmp_path / "newer") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    for name in ("text", "newer", "."):
        with pytest.raises(UserError, match="pass"):
            FileResults(tmp_path / name, seconds=60, most_bytes=100)
    results = open_results(None, tmp_path / "text", seconds=60)  # the usual file is not what was asked for
    assert results.path == MEMORY
    asyncio.run(results.close())
    with pytest.raises(UserError):
        open_results(str(tmp_path / "text"), MEMORY, seconds=60)
    assert open_results("off", MEMORY, seconds=60) is None


def test_the_usual_file_is_of_a_model_and_a_port(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert str(usual_file("Qwen/Qwen3 4B", 8000)) == "/state/dspark/Qwen-Qwen3-4B-8000.answers"
    assert usual_file("../../x", 1).parent == usual_file("y", 1).parent


def test_servers_at_one_redis_share_claims_until_they_run_out(redis_url):
    async def main():
        dead, alive, third = (RedisResults(redis_url, seconds=60, lease_seconds=2.0) for _ in range(3))
        assert await dead.begin("k", "print") is None
        dead._renewing.cancel()  # killed
        assert await alive.begin("other", "print") is None
        assert await third.begin("k", "print") == Busy("print")
        await asyncio.sleep(2.5)
        assert await third.begin("other", "print") == Busy("print")  # renewed by the one that lives
        assert await third.begin("k", "print") is None
        await dead.keep("k", ANSWER)  # it stood still; its claim is another's now
        assert await alive.begin("k", "print") == Busy("print")
        await third.keep("k", ANSWER)
        assert await alive.begin("k", "print") == ANSWER
        for one in (dead, alive, third):
            await one.close()

    asyncio.run(main())


def test_a_redis_that_is_gone(tmp_path):
    with pytest.raises(UserError, match=r"no Redis answers at 127\.0\.0\.1") as refused:
        RedisResults("redis://user:secret@127.0.0.1:1/0", seconds=60)
    assert "secret" not in str(refused.value)

    async def main(url, stop):
        results = RedisResults(url, seconds=60)
        stop()
        with pytest.raises(ApiError) as failed:
            await results.begin("k", "print")
        assert failed.value.status == 503
        await results.close()

    with running_redis(tmp_path) as url:
        import redis

        asyncio.run(main(url, lambda: redis.from_url(url).shutdown(nosave=True)))
