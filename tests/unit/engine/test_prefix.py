"""Pages with memory never leak, and are found exactly by the tokens they hold."""

import random

import pytest

from dspark.engine.prefix import PagePool, extend_names

SIZE = 4


def names_of(tokens):
    names = []
    extend_names(names, tokens, SIZE)
    return names


def held(pool, tokens):
    """A request that committed `tokens`: takes pages for them, publishes the full ones."""
    names = names_of(tokens)
    pages = pool.find(names)
    while len(pages) * SIZE < len(tokens):
        pages.append(pool.take())
    for name, page in zip(names, pages, strict=False):
        pool.publish(name, page)
    return pages


def test_names_chain():
    a, b = names_of(range(12)), names_of([9, *range(1, 12)])
    assert len(a) == 3 and len(set(a) | set(b)) == 6
    assert names_of(range(11)) == a[:2]
    again = a[:1]
    extend_names(again, list(range(12)), SIZE)
    assert again == a


def test_released_pages_are_found_again_and_evicted_last_page_first():
    pool = PagePool(6, SIZE)
    pages = held(pool, range(12))
    pool.release(pages)
    assert pool.available == 5
    pool.check_integrity([])
    found = pool.find(names_of(range(12)))
    assert found == pages
    pool.release(found)
    taken = [pool.take() for _ in range(3)]  # two were free, the third evicts the last page
    assert pages[2] in taken
    assert pool.find(names_of(range(12))) == pages[:2]
    pool.check_integrity([taken, pages[:2]])
    assert [pool.take() for _ in range(1)] == [None]


def test_the_same_text_twice_keeps_the_first_copy():
    pool = PagePool(9, SIZE)
    first, second = [pool.take()], [pool.take()]
    for pages in (first, second):
        pool.publish(names_of(range(4))[0], pages[0])
    pool.release(second)
    assert pool.find(names_of(range(4))) == first
    pool.check_integrity([first, first])


def test_without_memory_nothing_is_found():
    pool = PagePool(4, SIZE, remember=False)
    pool.release(held(pool, range(8)))
    assert pool.find(names_of(range(8))) == [] and pool.available == 3


@pytest.mark.parametrize("seed", range(5))
def test_any_history_keeps_the_books(seed):
    rng, pool, alive = random.Random(seed), PagePool(20, SIZE), []
    for _ in range(300):
        if alive and rng.random() < 0.5:
            pool.release(alive.pop(rng.randrange(len(alive))))
        elif pool.available >= 5:
            alive.append(held(pool, [rng.randrange(2) for _ in range(rng.randrange(1, 20))]))
        if rng.random() < 0.02:
            pool.forget_all()
        pool.check_integrity(alive)
    for pages in alive:
        pool.release(pages)
    pool.forget_all()
    pool.check_integrity([])
    assert pool.available == 19


def test_integrity_sees_a_leak():
    pool = PagePool(4, SIZE)
    page = pool.take()
    with pytest.raises(AssertionError, match="wrong counts"):
        pool.check_integrity([])
    pool.check_integrity([[page]])
