# A server with the local engine, on a CPU:
#   docker build -t eloquent .
#   docker run --init -p 4433:4433/udp -p 4433:4433/tcp -p 127.0.0.1:8080:8080/tcp -v eloquent:/state eloquent
# In front of other engines it needs no torch: docker build --build-arg EXTRAS=server,redis ...
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 (what pytorch.org names for your driver).
FROM python:3.11-slim AS build
ARG EXTRAS=server,redis,engine
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/eloquent \
    && case ",$EXTRAS," in *,engine,*) /opt/eloquent/bin/pip install --no-cache-dir \
        --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" ;; esac
COPY eloquent eloquent
COPY server server
COPY client client
COPY netem netem
RUN /opt/eloquent/bin/pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /state eloquent \
    && install -d -o eloquent -g eloquent -m 0700 /state
COPY --from=build /opt/eloquent /opt/eloquent
ENV PATH=/opt/eloquent/bin:$PATH \
    ELOQUENT_SERVE_HOST=0.0.0.0 \
    ELOQUENT_SERVE_HTTP=0.0.0.0:8080 \
    ELOQUENT_SERVE_STATE=/state \
    ELOQUENT_SERVE_LOG_FORMAT=json \
    ELOQUENT_SERVE_LOG_LEVEL=info \
    ELOQUENT_CACHE_DIR=/state/models
USER eloquent
VOLUME /state
EXPOSE 4433/udp 4433/tcp 8080/tcp
# Give it longer than --drain-timeout, which is 30 s: docker stop --time 45.
STOPSIGNAL SIGTERM
# HTTPS where there is a certificate, however that was given.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m CMD ["python", "-c", "\
import contextlib, http.client, ssl, sys, urllib.request\n\
for scheme in ('http', 'https'):\n\
    with contextlib.suppress(OSError, http.client.HTTPException):\n\
        tls = ssl._create_unverified_context()\n\
        urllib.request.urlopen(scheme + '://127.0.0.1:8080/health', timeout=4, context=tls)\n\
        sys.exit()\n\
sys.exit(1)"]
ENTRYPOINT ["eloquent", "serve"]
