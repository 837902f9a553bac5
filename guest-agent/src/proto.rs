//! The messages and the server trait of `proto/agent.proto`.
#![allow(clippy::all, clippy::unwrap_used, clippy::expect_used, dead_code)]

tonic::include_proto!("vmruntime.agent.v1");
