"""A service that names the classes of pictures, by a file of `zoo export`; what comes at the same time is run as one batch.

    ZOO_MODEL=digits.onnx uvicorn --app-dir examples serve:app
    curl --data-binary @seven.png "http://127.0.0.1:8000/classes?top=3"
"""
import asyncio
import io
import os
from contextlib import asynccontextmanager

import timm.data
import torch
from fastapi import FastAPI, HTTPException, Query, Request

from zoo.errors import InputError
from zoo.predicting.exported import ExportedNetwork, exported_info
from zoo.reading.pictures import open_picture

MAX_BYTES, MAX_BATCH, MAX_WAITING = 10_000_000, 32, 256
os.environ.setdefault("ZOO_MAX_PIXELS", "25000000")  # looked at before a picture is decoded
network = ExportedNetwork(os.environ["ZOO_MODEL"])
info = exported_info(network)
transform = timm.data.create_transform(**info.data_config, is_training=False)
waiting: asyncio.Queue = asyncio.Queue(MAX_WAITING)


async def answer() -> None:
    while True:
        batch = [await waiting.get()]
        while len(batch) < MAX_BATCH and not waiting.empty():
            batch.append(waiting.get_nowait())
        images, futures = zip(*batch, strict=True)
        try:
            results = (await asyncio.to_thread(network, torch.stack(images))).softmax(1)
        except Exception as error:  # whoever waits is told, and the service goes on
            results = [error] * len(batch)
        for future, result in zip(futures, results, strict=True):
            if not future.done():  # as it is where somebody has hung up
                future.set_result(result)


@asynccontextmanager
async def lifespan(_: FastAPI):
    task = asyncio.create_task(answer())
    yield
    task.cancel()


app = FastAPI(title=info.name, lifespan=lifespan)


@app.post("/classes")
async def classes(request: Request, top: int = Query(5, ge=1)) -> list[dict]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the picture has more than {MAX_BYTES} bytes")
    try:
        picture = await asyncio.to_thread(open_picture, io.BytesIO(body), info.input_size[0])
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((await asyncio.to_thread(transform, picture), future))
        result = await future
    except InputError as error:
        raise HTTPException(422, str(error)) from None
    except asyncio.QueueFull:
        raise HTTPException(503, f"{MAX_WAITING} pictures are waiting already") from None
    if isinstance(result, Exception):
        raise HTTPException(500, str(result))
    best = result.topk(min(top, len(result)))
    return [{"class": info.class_name(i), "probability": p} for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
