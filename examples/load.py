"""How many pictures a service answers for in a second, and how long each waits: `python examples/load.py URL PICTURE …`."""
import argparse
import asyncio
import time
from pathlib import Path

import httpx


async def load(url: str, pictures: list[bytes], requests: int, at_once: int) -> tuple[list[httpx.Response], list[float], float]:
    """The answers in the order of asking, the seconds that each took, and the seconds in all; picture i is asked for in request i."""
    gate, taken = asyncio.Semaphore(at_once), [0.0] * requests
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=at_once)) as client:
        async def ask(i: int) -> httpx.Response:
            async with gate:
                begun = time.perf_counter()
                answer = await client.post(url, content=pictures[i % len(pictures)])
                taken[i] = time.perf_counter() - begun
                return answer

        begun = time.perf_counter()
        answers = await asyncio.gather(*map(ask, range(requests)))
        return answers, taken, time.perf_counter() - begun


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    answers, taken, seconds = asyncio.run(load(args.url, [path.read_bytes() for path in args.pictures], args.requests, args.at_once))
    well, taken = sum(answer.is_success for answer in answers), sorted(taken)
    half, most = (taken[len(taken) * percent // 100] * 1000 for percent in (50, 99))
    print(f"{well} of {args.requests} answered, {args.requests / seconds:.0f} a second; half within {half:.0f} ms, 99 % in {most:.0f} ms")
