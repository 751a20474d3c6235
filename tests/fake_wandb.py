"""A W&B server in this process, of as much of its protocol as the real client needs.

It keeps what arrives, so that a test can ask what a person would see in W&B:

    with FakeWandb() as server:
        ...  # WANDB_BASE_URL=server.url WANDB_API_KEY=server.api_key
        server.runs[project, run_id].history

The client speaks GraphQL for everything but the rows it logs, which it posts to a run's file stream, and files, which
it puts to addresses that the server hands out.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

ENTITY = "team"
ORGANIZATION = "org"
_CREATED = "2026-01-01T00:00:00Z"
Reply = tuple[int, Any]  # HTTP status; bytes, or what becomes JSON


@dataclass
class Run:
    project: str
    id: str
    node_id: str
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    sweep: str = ""
    used: list[str] = field(default_factory=list)  # names of artifacts: its lineage
    exit_code: int | None = None  # of a run that ended

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


@dataclass
class Artifact:
    """A version of a collection: the first that holds its digest."""

    id: str
    project: str
    name: str
    type: str
    metadata: dict[str, Any]
    digest: str
    version: int
    aliases: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # uploaded
    references: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)  # collections of registries
    committed: bool = False


@dataclass
class Sweep:
    config: str  # as YAML
    trials: list[dict[str, Any]] = field(default_factory=list)  # what the agent gets to run, one at a time


class FakeWandb:
    """The server. `fail_with` is the HTTP status of an outage; 0 is none."""

    def __init__(self, api_key: str = "k" * 40):
        self.api_key = api_key
        self.fail_with = 0
        self.runs: dict[tuple[str, str], Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.files: dict[str, bytes] = {}
        self._http = _HttpServer(("127.0.0.1", 0), _handler_for(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeWandb:
        # Polling often only makes the shutdown quick.
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, authorization: str, body: bytes) -> Reply:
        if self.fail_with:
            return self.fail_with, _errors("out of order")
        if path.startswith("/upload/"):  # such addresses are secrets themselves and carry no key
            return self._upload(method, path, body)
        if authorization != "Basic " + base64.b64encode(f"api:{self.api_key}".encode()).decode():
            return 401, _errors("user is not logged in")
        if path == "/graphql":
            return self._graphql(**json.loads(body))
        if stream := re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", path):
            self._append(self.runs[stream[1], stream[2]], json.loads(body))
            return 200, {}
        return 404, _errors(path)

    def _upload(self, method: str, path: str, body: bytes) -> Reply:
        if method == "PUT":
            self.files[path] = body
            if manifest := re.fullmatch(r"/upload/(artifact-\d+)/manifest", path):
                entries = json.loads(body)["contents"]
                self.artifacts[manifest[1]].references = {n: e["ref"] for n, e in entries.items() if "ref" in e}
        return (200, self.files[path]) if path in self.files else (404, _errors(path))

    def _append(self, run: Run, message: dict[str, Any]) -> None:
        for name, chunk in (message.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history[chunk["offset"] :] = map(json.loads, chunk["content"])
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if message.get("complete"):
            run.exit_code = message["exitcode"]

    def _graphql(self, query: str, variables: dict[str, Any] | None = None, **_: Any) -> Reply:
        """Call the method that has the operation's name. Mutations come with a lone `input` or with its fields."""
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        operation = getattr(self, name[1], None) if name else None
        if operation is None:
            return 200, {"data": {}} | _errors(f"unknown operation: {query[:80]}")
        variables = variables or {}
        return 200, {"data": operation(**variables.get("input", variables))}

    # Queries and mutations, named as the client names them

    def Viewer(self, **_: Any) -> dict[str, Any]:
        teams = {"edges": [{"node": {"id": "t", "name": ENTITY}}]}
        return {"viewer": {"id": "u", "entity": ENTITY, "username": "u", "email": "", "flags": "{}", "teams": teams}}

    def ServerFeaturesQuery(self, **_: Any) -> dict[str, Any]:
        feature = {"name": "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE", "isEnabled": True}
        return {"serverInfo": {"features": [feature]}}

    def OrganizationCoreWeaveOrganizationID(self, **_: Any) -> dict[str, Any]:
        return {"entity": None}

    def RunStoppedStatus(self, **_: Any) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def RunResumeStatus(self, project: str, name: str, **_: Any) -> dict[str, Any]:
        run = self.runs.get((project, name))
        bucket = run and {
            "id": run.node_id,
            "name": run.id,
            "displayName": run.name,
            "config": json.dumps(run.config),
            "tags": run.tags,
            "notes": run.notes,
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": _project(project) | {"bucket": bucket}}

    def UpsertBucket(self, **given: Any) -> dict[str, Any]:
        """Make a run, or update the one of this node id or this name."""
        run = next((run for run in self.runs.values() if run.node_id == given.get("id")), None)
        key = (run.project, run.id) if run else (given["project"], given["name"])
        inserted = key not in self.runs
        run = self.runs.setdefault(key, Run(*key, node_id=f"node-{len(self.runs)}"))
        run.name = given.get("displayName") or run.name
        run.group = given.get("groupName") or run.group
        run.job_type = given.get("jobType") or run.job_type
        run.tags = given.get("tags") or run.tags
        run.notes = given.get("notes") or run.notes
        run.sweep = given.get("sweep") or run.sweep
        run.config = json.loads(given.get("config") or "null") or run.config
        bucket = {
            "id": run.node_id,
            "name": run.id,
            "displayName": run.name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": run.sweep or None,
            "project": _project(run.project),
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def CreateRunFiles(self, project: str, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        uploads = [{"name": name, "uploadUrl": f"{self.url}/upload/{project}/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": uploads}}

    def ArtifactType(self, **_: Any) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def CreateArtifact(self, **given: Any) -> dict[str, Any]:
        project, name = given["projectName"], given["artifactCollectionName"]
        versions = [a for a in self.artifacts.values() if (a.project, a.name) == (project, name)]
        artifact = next((a for a in versions if a.committed and a.digest == given["digest"]), None)
        if artifact is None:
            artifact = Artifact(
                id=f"artifact-{len(self.artifacts)}",
                project=project,
                name=name,
                type=given["artifactTypeName"],
                metadata=json.loads(given.get("metadata") or "{}"),
                digest=given["digest"],
                version=len(versions),
            )
            self.artifacts[artifact.id] = artifact
        aliases = [alias["alias"] for alias in given.get("aliases") or []]
        for other in versions:
            other.aliases = [alias for alias in other.aliases if alias not in aliases]
        artifact.aliases = sorted({*artifact.aliases, *aliases})
        answer = {"id": artifact.id, "state": "COMMITTED" if artifact.committed else "PENDING"}
        return {"createArtifact": {"artifact": answer | {"artifactSequence": {"latestArtifact": None}}}}

    def UseArtifact(self, artifactID: str, projectName: str, runName: str, **_: Any) -> dict[str, Any]:
        self.runs[projectName, runName].used.append(self.artifacts[artifactID].name)
        return {"useArtifact": {"artifact": {"id": artifactID}}}

    def ArtifactByID(self, id: str, **_: Any) -> dict[str, Any]:
        return {"artifact": self._described(self.artifacts[id])}

    def FetchOrgInfoFromEntity(self, entity: str) -> dict[str, Any]:
        return {"entity": {"organization": {"name": ORGANIZATION, "orgEntity": {"name": ORGANIZATION}}, "user": None}}

    def LinkArtifact(self, artifactID: str, artifactPortfolioName: str, projectName: str, **_: Any) -> dict[str, Any]:
        artifact = self.artifacts[artifactID]
        artifact.links.append(f"{projectName}/{artifactPortfolioName}")
        collection = {"__typename": "ArtifactPortfolio", "name": artifactPortfolioName}
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "membership",
            "versionIndex": 0,
            "createdAt": _CREATED,
            "aliases": [],
            "artifactCollection": collection | {"project": _project(projectName) | {"internalId": "i"}},
            "artifact": self._described(artifact),
        }
        return {"result": {"versionIndex": 0, "artifactMembership": membership}}

    def _described(self, artifact: Artifact) -> dict[str, Any]:
        sequence = {"__typename": "ArtifactSequence", "name": artifact.name}
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": sequence | {"project": _project(artifact.project) | {"internalId": "i"}},
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.type},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": 0,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if artifact.committed else "PENDING",
            "size": 0,
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "c",
            "fileCount": len(artifact.files),
            "createdAt": _CREATED,
            "updatedAt": None,
            "aliases": [],
        }

    def CreateArtifactManifest(self, artifactID: str, **_: Any) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(artifactID)}}

    def UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(artifactManifestID)}}

    def _manifest(self, artifact_id: str) -> dict[str, Any]:
        upload = {"id": "f", "uploadUrl": f"{self.url}/upload/{artifact_id}/manifest", "uploadHeaders": []}
        return {"id": artifact_id, "file": upload}

    def CreateArtifactFiles(self, artifactFiles: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        edges = []
        for file in artifactFiles:
            self.artifacts[file["artifactID"]].files.append(file["name"])
            node = {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/upload/{file['artifactID']}/files/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def CommitArtifact(self, artifactID: str) -> dict[str, Any]:
        artifact = self.artifacts[artifactID]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": artifact.digest}}}

    # Sweeps that `wandb agent` runs: the server draws no trials of its own, a test puts them into `Sweep.trials`

    def UpsertSweep(self, config: str, projectName: str, **_: Any) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = Sweep(config)
        return {
            "upsertSweep": {"sweep": {"name": name, "project": _project(projectName)}, "configValidationWarnings": []}
        }

    def SweepWithRuns(self, sweep: str, **_: Any) -> dict[str, Any]:
        found = {"id": sweep, "name": sweep, "config": self.sweeps[sweep].config, "runs": {"edges": []}}
        return {"project": {"sweep": found}}

    def CreateAgent(self, sweep: str, projectName: str, **_: Any) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": f"{projectName}/{sweep}"}}}

    def Heartbeat(self, id: str, runState: str, **_: Any) -> dict[str, Any]:
        """Give an idle agent the next trial, in a run that the server makes for it."""
        project, sweep = id.split("/")
        trials, commands = self.sweeps[sweep].trials, []
        if json.loads(runState) == {}:
            commands = [{"type": "exit"}]
            if trials:
                run_id = f"trial{len(self.runs)}"
                self.runs[project, run_id] = Run(project, run_id, node_id=f"node-{len(self.runs)}", sweep=sweep)
                args = {name: {"value": value} for name, value in trials.pop(0).items()}
                commands = [{"type": "run", "run_id": run_id, "args": args, "program": None}]
        return {"agentHeartbeat": {"agent": {"id": id}, "commands": json.dumps(commands)}}


def _errors(message: str) -> dict[str, Any]:
    return {"errors": [{"message": message}]}


def _project(name: str) -> dict[str, Any]:
    return {"id": name, "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


class _HttpServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: a killed client breaks its connections."""


def _handler_for(server: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the client keeps connections

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            status, reply = server.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = handle_request

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet: a test's output is its own."""

    return Handler
