# diffpo on an NVIDIA GPU. Build in a clone, then mount your data and keep the caches:
#   docker build -t diffpo .
#   docker run --gpus all -v "$PWD:/work" -v "$HOME/.cache:/root/.cache" diffpo train configs/sdxl_diffusion_dpo.yaml data.train=my-pairs
# Not built or run yet: no machine with docker, a network and a GPU was at hand.
# torch's wheels bring their own CUDA libraries, so the base image needs the driver's interface alone.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/diffpo/bin:$PATH
COPY pyproject.toml README.md LICENSE constraints.txt /src/
COPY diffpo /src/diffpo
COPY samplers /src/samplers
COPY configs /src/configs
COPY assets /src/assets
RUN python3 -m venv /opt/diffpo \
    && pip install --no-cache-dir --constraint /src/constraints.txt "/src[quantised,trackers]" \
    && rm -rf /src
WORKDIR /work
ENTRYPOINT ["diffpo"]
