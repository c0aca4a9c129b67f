# Stage one: the tokenize job, with Ray; also the image of a Ray cluster's head and workers. Build from the repository root:
#   docker build -f docker/tokenize.Dockerfile -t asvr-tokenize .
# Run on one machine:
#   docker run --gpus all --shm-size 16g -v /data:/data asvr-tokenize asvr tokenize /data/recipe.yaml
# On a cluster: docker/compose.yaml, docker/kubernetes/tokenize.yaml.
FROM python:3.11-slim
WORKDIR /opt/asvr
COPY pyproject.toml constraints.txt README.md ./
COPY manifests manifests
COPY tokenize_stage tokenize_stage
COPY train_stage train_stage
COPY pipeline pipeline
# ray[default] has the dashboard that `ray job submit` talks to, ray[client] the ray:// address.
RUN pip install --no-cache-dir --constraint constraints.txt '.[tokenize]' 'ray[client,default]'
CMD ["asvr", "--help"]
