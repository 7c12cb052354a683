"""JSON schemas of the parts of KubeRay's RayCluster and RayJob that our files use, strict: an unknown key fails.

Written from the field names, types, required keys and enumerations of the custom resource definitions ray.io/v1
(rayclusters and rayjobs, KubeRay v1.4; ``authOptions`` as of v1.5.1 and ``secretName`` in it as of v1.6.2, from the API
reference) and of the pod template of Kubernetes v1 that they hold.
"""

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"},
    ]
}
PORT: Schema = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, NAME]}


def keys(*required: str, **properties: Schema) -> Schema:
    """Return an object of these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def one_key(**properties: Schema) -> Schema:
    """Return an object of exactly one of these keys."""
    return keys(**properties) | {"minProperties": 1, "maxProperties": 1}


def array(items: Schema) -> Schema:
    """Return an array of at least one."""
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> Schema:
    """Return an enumeration."""
    return {"enum": list(values)}


METADATA = keys(name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS)
KEY_REF = keys("key", name=STRING, key=STRING, optional=BOOLEAN)
ENV = keys(
    "name",
    name=STRING,
    value=STRING,
    valueFrom=one_key(
        secretKeyRef=KEY_REF,
        configMapKeyRef=KEY_REF,
        fieldRef=keys("fieldPath", apiVersion=STRING, fieldPath=STRING),
        resourceFieldRef=keys("resource", containerName=STRING, divisor=QUANTITY, resource=STRING),
    ),
)
NAMED = keys("name", name=STRING, optional=BOOLEAN)
ENV_FROM = keys(prefix=STRING, secretRef=NAMED, configMapRef=NAMED)
AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = keys(requests=AMOUNTS, limits=AMOUNTS)
SECCOMP = keys("type", type=one_of("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=STRING)
ACTION = {
    "exec": keys("command", command=array(STRING)),
    "httpGet": keys("port", path=STRING, port=PORT, host=STRING, scheme=one_of("HTTP", "HTTPS")),
    "tcpSocket": keys("port", port=PORT, host=STRING),
}
PROBE = keys(
    **ACTION,
    initialDelaySeconds=INTEGER,
    periodSeconds=INTEGER,
    timeoutSeconds=INTEGER,
    successThreshold=INTEGER,
    failureThreshold=INTEGER,
)
CONTAINER_SECURITY = keys(
    allowPrivilegeEscalation=BOOLEAN,
    privileged=BOOLEAN,
    readOnlyRootFilesystem=BOOLEAN,
    runAsNonRoot=BOOLEAN,
    runAsUser=INTEGER,
    runAsGroup=INTEGER,
    capabilities=keys(add=array(STRING), drop=array(STRING)),
    seccompProfile=SECCOMP,
)
CONTAINER = keys(
    "name",
    "image",
    name=NAME,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=array(STRING),
    args=array(STRING),
    env=array(ENV),
    envFrom=array(ENV_FROM),
    resources=RESOURCES,
    ports=array(keys("containerPort", containerPort=INTEGER, name=NAME, protocol=one_of("TCP", "UDP", "SCTP"))),
    volumeMounts=array(
        keys("name", "mountPath", name=NAME, mountPath=STRING, subPath=STRING, readOnly=BOOLEAN),
    ),
    securityContext=CONTAINER_SECURITY,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    startupProbe=PROBE,
    lifecycle=keys(preStop=one_key(**ACTION), postStart=one_key(**ACTION)),
)
VOLUME = keys(
    "name",
    name=NAME,
    emptyDir=keys(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=keys("claimName", claimName=NAME, readOnly=BOOLEAN),
    secret=keys(secretName=STRING, defaultMode=INTEGER, optional=BOOLEAN),
    nfs=keys("server", "path", server=STRING, path=STRING, readOnly=BOOLEAN),
) | {"minProperties": 2, "maxProperties": 2}
TOLERATION = keys(
    key=STRING,
    operator=one_of("Exists", "Equal"),
    value=STRING,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=INTEGER,
)
POD = keys(
    "containers",
    containers=array(CONTAINER),
    initContainers=array(CONTAINER),
    volumes=array(VOLUME),
    nodeSelector=STRINGS,
    tolerations=array(TOLERATION),
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    serviceAccountName=STRING,
    automountServiceAccountToken=BOOLEAN,
    terminationGracePeriodSeconds=INTEGER,
    imagePullSecrets=array(keys(name=STRING)),
    securityContext=keys(
        runAsNonRoot=BOOLEAN,
        runAsUser=INTEGER,
        runAsGroup=INTEGER,
        fsGroup=INTEGER,
        fsGroupChangePolicy=one_of("Always", "OnRootMismatch"),
        supplementalGroups=array(INTEGER),
        seccompProfile=SECCOMP,
    ),
)
POD_TEMPLATE = keys("spec", metadata=METADATA, spec=POD)

RAY_CLUSTER_SPEC = keys(
    "headGroupSpec",
    suspend=BOOLEAN,
    rayVersion=STRING,
    authOptions=keys(mode=one_of("disabled", "token"), secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=keys(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=INTEGER,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        image=STRING,
        imagePullPolicy=STRING,
        resources=RESOURCES,
        env=array(ENV),
        envFrom=array(ENV_FROM),
        securityContext=CONTAINER_SECURITY,
    ),
    headServiceAnnotations=STRINGS,
    headGroupSpec=keys(
        "template",
        "rayStartParams",
        template=POD_TEMPLATE,
        rayStartParams=STRINGS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=BOOLEAN,
    ),
    workerGroupSpecs=array(
        keys(
            "groupName",
            "maxReplicas",
            "minReplicas",
            "rayStartParams",
            "template",
            groupName=NAME,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            numOfHosts=INTEGER,
            idleTimeoutSeconds=INTEGER,
            suspend=BOOLEAN,
            rayStartParams=STRINGS,
            template=POD_TEMPLATE,
            scaleStrategy=keys(workersToDelete=array(STRING)),
        )
    ),
)
RAY_JOB_SPEC = keys(
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=POD_TEMPLATE,
    submitterConfig=keys(backoffLimit=INTEGER),
    clusterSelector=STRINGS,
    metadata=STRINGS,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    suspend=BOOLEAN,
    rayClusterSpec=RAY_CLUSTER_SPEC,
)


def resource(kind: str, spec: Schema) -> Schema:
    """Return the schema of a whole resource of ray.io/v1."""
    return keys(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=METADATA | {"required": ["name"]},
        spec=spec,
    )


SCHEMAS = {"RayCluster": resource("RayCluster", RAY_CLUSTER_SPEC), "RayJob": resource("RayJob", RAY_JOB_SPEC)}
