# The command line with all its extras, from Python packages alone, in the versions that the tests run with.  docs/installing.md
#   docker build -t delora .                              for processors
#   docker build -t delora --build-arg TORCH=cu128 .      for NVIDIA's cards; any of uv's names of a build of torch
FROM python:3.11-slim
ARG TORCH=cpu
# uv is pip's equal that knows where each build of torch lies.
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /opt/delora
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN uv pip install --system --no-cache --torch-backend="$TORCH" --constraint constraints.txt '.[all]'
WORKDIR /work
ENTRYPOINT ["delora"]
