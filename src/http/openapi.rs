//! The specification: its head, and the problems of every route, which handlers list by code in
//! `x-problems`.

use std::collections::BTreeMap;

use serde_json::json;
use utoipa::{
    Modify, Number, OpenApi,
    openapi::{
        ContentBuilder, Ref, RefOr, ResponseBuilder, Schema,
        example::ExampleBuilder,
        header::HeaderBuilder,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};

use super::{
    openai::{
        answer::{Answer, ChatChunkChoice},
        error::{self, OpenAiError},
    },
    problem::{Code, Problem, ProblemBody, ProblemError},
    types::{BatchItem, StreamEvent},
};
use crate::sampling::PARAMETERS;

const X_PROBLEMS: &str = "x-problems";
const EXAMPLE_ID: &str = "0199d4c8-7b1e-7d3a-a8f0-5b8a4c1d2e3f";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Softserve",
        description = "Many tuned prompts, one frozen model, one server.\n\nA task is a name under which one learned \
            prompt is served. Errors are `application/problem+json` (RFC 9457) with a stable `code`."
    ),
    tags(
        (name = "generate", description = "Asking tasks"),
        (name = "openai", description = "OpenAI's API: `model` is a task, `task@version`, or the base model's name. Errors have \
            OpenAI's shape"),
        (name = "tasks", description = "What can be asked"),
        (name = "admin", description = "Uploading, activating and deleting; needs an admin key unless the server \
            listens on a loopback address and has no keys"),
        (name = "health", description = "For load balancers and monitoring; always open")
    ),
    components(schemas(ProblemBody, ProblemError, BatchItem, OpenAiError, StreamEvent, Answer<ChatChunkChoice>)),
    modifiers(&Keys)
)]
struct Head;

struct Keys;

impl Modify for Keys {
    fn modify(&self, spec: &mut utoipa::openapi::OpenApi) {
        let bearer = |text| {
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(text)).build())
        };
        let components = spec.components.get_or_insert_default();
        components.add_security_scheme("api_key", bearer("An API key of the server, if it requires one"));
        components.add_security_scheme("admin_key", bearer("An admin key of the server"));
    }
}

/// What stands above the routes.
pub fn head() -> utoipa::openapi::OpenApi {
    Head::openapi()
}

/// The whole specification.
pub fn spec() -> utoipa::openapi::OpenApi {
    finish(super::routes().into_openapi())
}

/// The whole specification as it is printed and committed.
pub fn json() -> serde_json::Result<String> {
    Ok(spec().to_pretty_json()? + "\n")
}

/// Adds to each route the problems and keys that go with it.
pub fn finish(mut spec: utoipa::openapi::OpenApi) -> utoipa::openapi::OpenApi {
    for (path, item) in &mut spec.paths.paths {
        let operations =
            [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().filter_map(Option::as_mut);
        for operation in operations {
            add_problems(path, operation);
            add_keys(path, operation);
        }
    }
    describe_sampling(&mut spec);
    spec
}

/// Describes the sampling parameters, wherever they are given, by their table.
fn describe_sampling(spec: &mut utoipa::openapi::OpenApi) {
    let schemas = spec.components.iter_mut().flat_map(|components| &mut components.schemas);
    for (name, schema) in schemas {
        let RefOr::T(Schema::Object(schema)) = schema else { continue };
        if !["GenerateRequest", "BatchItem", "Defaults", "CompletionRequest", "ChatRequest"].contains(&name.as_str()) {
            continue;
        }
        for parameter in PARAMETERS {
            let Some(RefOr::T(Schema::Object(field))) = schema.properties.get_mut(parameter.name) else { continue };
            let (least, most) = parameter.range.bounds();
            field.description = Some(format!("{} Server default: {}.", parameter.doc, parameter.default));
            field.minimum = Some(Number::Int(least.into()));
            field.maximum = most.map(|most| Number::Int(most.into()));
        }
    }
}

fn add_problems(path: &str, operation: &mut Operation) {
    let listed = operation.extensions.as_mut().and_then(|extensions| extensions.remove(X_PROBLEMS));
    operation.extensions = operation.extensions.take().filter(|extensions| !extensions.is_empty());
    let listed: Vec<String> = listed.and_then(|list| serde_json::from_value(list).ok()).unwrap_or_default();
    let names_task = listed.iter().any(|code| code == Code::TaskNotFound.as_str());
    let (is_admin, is_metrics) = (path.starts_with("/v1/admin"), path == "/metrics");
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for &code in Code::ALL {
        let of_layers = match code {
            Code::Unauthorized | Code::Forbidden => needs_key(path),
            Code::RateLimited => needs_key(path) && !is_admin && !is_metrics,
            Code::PromptUnreadable => names_task,
            Code::StoreUnavailable => names_task || is_admin,
            Code::Overloaded => names_task && !is_admin,
            Code::InvalidRequest => path.contains('{'),
            Code::Internal => true,
            _ => false,
        };
        if of_layers || listed.iter().any(|listed| listed == code.as_str()) {
            by_status.entry(code.status().as_u16()).or_default().push(code);
        }
    }
    for (status, codes) in by_status {
        operation.responses.responses.insert(status.to_string(), RefOr::T(problems(path, &codes)));
    }
}

/// The response of one status, with an example for each code.
fn problems(path: &str, codes: &[Code]) -> utoipa::openapi::Response {
    let lines: Vec<String> = codes.iter().map(|code| format!("`{}`: {}", code.as_str(), code.when())).collect();
    let is_openai = error::is_of(path);
    let examples = codes.iter().map(|&code| {
        let problem = Problem::new(code, code.when().trim_end_matches('.').to_owned());
        let body = match is_openai {
            true => json!(error::body(&problem, EXAMPLE_ID)),
            false => json!(problem.body(EXAMPLE_ID)),
        };
        let example = ExampleBuilder::new().summary(code.title()).value(Some(body));
        (code.as_str(), RefOr::T(example.build()))
    });
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(if is_openai { "OpenAiError" } else { "Problem" })))
        .examples_from_iter(examples)
        .build();
    let mut response = ResponseBuilder::new()
        .description(lines.join("\n\n"))
        .content(if is_openai { "application/json" } else { "application/problem+json" }, content);
    if codes.iter().any(|&code| Problem::new(code, "").retry_after().is_some()) {
        response = response
            .header("retry-after", HeaderBuilder::new().description(Some("Seconds after which to try again")).build());
    }
    response.build()
}

/// Whether a path is closed to callers without a key, where the server has keys.
fn needs_key(path: &str) -> bool {
    !super::access::OPEN.contains(&path)
}

fn add_keys(path: &str, operation: &mut Operation) {
    if operation.security.is_some() || !needs_key(path) {
        return;
    }
    let key = |name: &str| SecurityRequirement::new(name, Vec::<String>::new());
    operation.security = Some(if path.starts_with("/v1/admin") {
        vec![key("admin_key"), SecurityRequirement::default()]
    } else {
        vec![key("api_key"), key("admin_key"), SecurityRequirement::default()]
    });
}
