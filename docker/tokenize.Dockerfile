# Stage one: the tokenize job, with Ray. Build from the repository root:
#   docker build -f docker/tokenize.Dockerfile -t asvr-tokenize .
# Run (one machine; on a cluster start it as the Ray head and worker image and pass `ray: {address: auto}`):
#   docker run --gpus all -v /data:/data asvr-tokenize tokenize /data/recipe.yaml
FROM python:3.11-slim
WORKDIR /opt/asvr
COPY pyproject.toml constraints.txt README.md ./
COPY manifests manifests
COPY tokenize_stage tokenize_stage
COPY train_stage train_stage
COPY pipeline pipeline
RUN pip install --no-cache-dir --constraint constraints.txt '.[tokenize]'
ENTRYPOINT ["asvr"]
