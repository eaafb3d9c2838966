# The command tgdp-fast with CPU kernels.
#
#   docker build -t tgdp_fast .
#   docker run --rm -v "$PWD:/data" tgdp_fast transfer --source source.npy --target target.npy --num 1000
#
# The default torch for Linux brings its CUDA libraries, several GB: choose a CPU build with
# --build-arg TORCH_PIP_ARGS="..." as for make.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH_SPEC="torch>=2.9"
ARG TORCH_PIP_ARGS=""
RUN pip install --no-cache-dir ${TORCH_PIP_ARGS} "${TORCH_SPEC}" \
    && pip install --no-cache-dir 'setuptools>=77' wheel ninja
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY tgdp_fast tgdp_fast
RUN TGDP_REQUIRE_CPU=1 pip install --no-cache-dir --no-build-isolation '.[plots,data,ecg]'
WORKDIR /data
ENTRYPOINT ["tgdp-fast"]
CMD ["info"]
