# stylemill on a CUDA machine.
#   docker build -t stylemill .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" stylemill run jobs/my-job.yaml
# Written by hand and never built here: the machine this was developed on has no Docker engine.

# torch's wheels bring their own CUDA libraries (torch 2.13: CUDA 13.0), so the base image without them is enough.
# It needs an NVIDIA driver of release 580 or newer and the NVIDIA container toolkit on the host.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and the headers: torch.compile (cluster.compile) builds with them.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/stylemill/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    USER=mill
RUN python3 -m venv /opt/stylemill

# The libraries change less often than the source, so they have a layer of their own: an empty package is enough for it.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p pipeline/stylemill \
 && touch pipeline/stylemill/__init__.py \
 && pip install --no-cache-dir -c constraints.txt ".[s3]"
COPY pipeline pipeline
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Mount /cache to keep downloaded models. For files owned by you: docker run --user "$(id -u):$(id -g)".
RUN useradd --create-home --uid 10001 mill \
 && install -d -o mill -m 1777 /cache /work
USER mill
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["stylemill"]
CMD ["--help"]
