"""What a hook noted: for its own thread; for a thread that has noted nothing, whatever was noted last."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

from llsa_gen.integrations.latest import Latest


def test_a_thread_reads_its_own_and_one_without_reads_the_last() -> None:
    latest = Latest(0)
    with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as silent:
        latest.note(1)
        other.submit(latest.note, 2).result()
        assert (latest.get(), other.submit(latest.get).result(), silent.submit(latest.get).result()) == (1, 2, 2)


def test_copies_and_pickles_note_for_themselves() -> None:
    latest = Latest(0)
    latest.note(1)
    for one in (copy.deepcopy(latest), pickle.loads(pickle.dumps(latest))):
        one.note(3)
        assert (one.get(), latest.get()) == (3, 1)
