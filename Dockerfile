# The builder's C library must not be newer than that of the image it runs in: both are Debian 12.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package drumlin && mkdir /empty

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/drumlin /usr/local/bin/drumlin
# What a fresh volume begins as: empty, and writable by the user below.
COPY --from=build --chown=65532:65532 /empty /var/lib/drumlin
USER 65532:65532
WORKDIR /var/lib/drumlin
# Clients; peers; HTTP. Of a nameserver: 9876 9877.
EXPOSE 8081 10912 8082 9876 9877
ENTRYPOINT ["/usr/local/bin/drumlin"]
