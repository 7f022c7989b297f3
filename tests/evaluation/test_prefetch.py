"""Work done ahead: in order, within bounds, and never with an error lost."""

import threading

import pytest

from nufilt_jax.evaluation.prefetch import computed_ahead


def test_order_is_kept_whoever_is_first():
    gates = [threading.Event() for _ in range(4)]
    gates[3].set()

    def work(job):
        assert gates[job].wait(20)
        if job > 0:
            gates[job - 1].set()  # the last job ends first
        return 10 * job

    assert list(computed_ahead(work, range(4), threads=4, ahead=4)) == [0, 10, 20, 30]


def test_no_more_than_asked_for_is_begun():
    begun = []
    source = (begun.append(job) or job for job in range(100))
    results = computed_ahead(lambda job: job, source, threads=2, ahead=5)
    assert begun == []
    assert [next(results), len(begun)] == [0, 6]
    assert [next(results), len(begun)] == [1, 7]
    results.close()
    assert len(begun) == 7
    assert list(computed_ahead(lambda job: job, range(3), threads=1, ahead=0)) == [0, 1, 2]


def test_work_is_done_by_other_threads():
    names = set(computed_ahead(lambda _: threading.current_thread().name, range(8), threads=2, ahead=4))
    assert len(names) <= 2
    assert all(name.startswith("nufilt-ahead") for name in names)


def test_an_error_comes_where_the_result_would():
    def work(job):
        if job == 2:
            raise KeyError("image 2")
        return job

    results = computed_ahead(work, range(6), threads=2, ahead=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="image 2"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_error_of_the_source_comes_out_too():
    def source():
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(computed_ahead(lambda job: job, source(), threads=1, ahead=2))
    assert threading.active_count() < 20
