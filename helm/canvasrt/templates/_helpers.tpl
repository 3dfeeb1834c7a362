{{- define "canvasrt.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "canvasrt.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "canvasrt.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* 44: names of the Job and its Pods are longer */ -}}
{{- $full | trunc 44 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "canvasrt.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "canvasrt.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "canvasrt.labels" -}}
{{ include "canvasrt.commonLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "canvasrt.selectorLabels" -}}
app.kubernetes.io/name: {{ include "canvasrt.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "canvasrt.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "canvasrt.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "canvasrt.workloadKind" -}}
{{- ternary "StatefulSet" "Deployment" .Values.statefulSet.enabled -}}
{{- end -}}

{{- define "canvasrt.flavor" -}}
{{- get (dict "tensorrt-rtx" "rtx" "tensorrt" "tensorrt" "torch" "cpu") .Values.profile.compiler -}}
{{- end -}}

{{- define "canvasrt.serverImage" -}}
{{- with .Values.image -}}
{{ .repository }}:{{ default (printf "%s-%s" $.Chart.AppVersion (include "canvasrt.flavor" $)) .tag }}
{{- end -}}
{{- end -}}

{{- define "canvasrt.builderImage" -}}
{{- with .Values.pipeline.image -}}
{{ .repository }}:{{ default (printf "%s-%s" $.Chart.AppVersion (include "canvasrt.flavor" $)) .tag }}
{{- end -}}
{{- end -}}

{{- define "canvasrt.podSecurityContext" -}}
{{ toYaml .Values.podSecurityContext }}
{{- end -}}

{{- define "canvasrt.containerSecurityContext" -}}
{{ toYaml .Values.containerSecurityContext }}
{{- end -}}

{{- /* A dict with root, api, key and what. */ -}}
{{- define "canvasrt.requireApi" -}}
{{- if not (.root.Capabilities.APIVersions.Has .api) -}}
{{- fail (printf "%s is true, and this cluster has no API %s: install %s, or set %s to false (helm template: --api-versions %s)" .key .api .what .key .api) -}}
{{- end -}}
{{- end -}}

{{- /* "true" where the server runs on a GPU. */ -}}
{{- define "canvasrt.onGpu" -}}
{{- if ne .Values.profile.compiler "torch" -}}true{{- end -}}
{{- end -}}

{{- /* "true" where preparing needs the GPU: TensorRT times its kernels on it. */ -}}
{{- define "canvasrt.preparesOnGpu" -}}
{{- $builds := and (eq .Values.profile.compiler "tensorrt") (not .Values.model.bundleSource) -}}
{{- $quantizes := and .Values.model.quantize.recipe (eq .Values.model.quantize.device "cuda") -}}
{{- if or $builds $quantizes -}}true{{- end -}}
{{- end -}}

{{- define "canvasrt.gpuResource" -}}
{{- if .Values.gpu.mig -}}nvidia.com/mig-{{ .Values.gpu.mig }}{{- else -}}{{ .Values.gpu.resourceName }}{{- end -}}
{{- end -}}

{{- define "canvasrt.draVersion" -}}
{{- range list "v1" "v1beta2" "v1beta1" -}}
{{- if $.Capabilities.APIVersions.Has (printf "resource.k8s.io/%s" .) -}}{{ . }},{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Resources of a container; a dict with root, resources and gpu ("true" or ""). */ -}}
{{- define "canvasrt.resources" -}}
{{- $all := deepCopy (default dict .resources) -}}
{{- if .gpu -}}
{{- if .root.Values.gpu.dra.enabled -}}
{{- $_ := set $all "claims" (list (dict "name" "gpu")) -}}
{{- else -}}
{{- $limits := merge (dict (include "canvasrt.gpuResource" .root) "1") (default dict $all.limits) -}}
{{- $_ := set $all "limits" $limits -}}
{{- end -}}
{{- end -}}
{{ toYaml $all }}
{{- end -}}

{{- /* nodeAffinity for a GPU of the profile. */ -}}
{{- define "canvasrt.gpuNodeAffinity" -}}
{{- $expressions := list -}}
{{- if .Values.profile.cpuArchitectures -}}
{{- $expressions = append $expressions (dict "key" "kubernetes.io/arch" "operator" "In" "values" .Values.profile.cpuArchitectures) -}}
{{- end -}}
{{- if include "canvasrt.onGpu" . -}}
{{- if eq .Values.gpu.nodeSelection "product" -}}
{{- $products := list -}}
{{- range .Values.profile.productNames -}}
{{- $products = append $products . -}}
{{- if $.Values.gpu.mig -}}{{- $products = append $products (printf "%s-MIG-%s" . $.Values.gpu.mig) -}}{{- end -}}
{{- end -}}
{{- $expressions = append $expressions (dict "key" "nvidia.com/gpu.product" "operator" "In" "values" $products) -}}
{{- else if eq .Values.gpu.nodeSelection "computeCapability" -}}
{{- $parts := splitList "." .Values.profile.computeCapability -}}
{{- $expressions = append $expressions (dict "key" "nvidia.com/gpu.compute.major" "operator" "In" "values" (list (first $parts))) -}}
{{- $expressions = append $expressions (dict "key" "nvidia.com/gpu.compute.minor" "operator" "In" "values" (list (last $parts))) -}}
{{- end -}}
{{- end -}}
{{- if $expressions -}}
requiredDuringSchedulingIgnoredDuringExecution:
  nodeSelectorTerms:
    - matchExpressions:
        {{- toYaml $expressions | nindent 8 }}
{{- end -}}
{{- end -}}

{{- /* The command of all three probes. */ -}}
{{- define "canvasrt.canary" -}}
exec:
  command:
    - curl
    - -fsS
    - -o
    - /dev/null
    - -m
    - {{ .Values.server.answerSeconds | quote }}
    - -d
    - '{"ping": true}'
    - http://{{ ternary "[::1]" "127.0.0.1" (contains ":" .Values.server.host) }}:8000/v2/models/diffusion_gemma/generate
timeoutSeconds: {{ add .Values.server.answerSeconds 2 }}
{{- end -}}

{{- define "canvasrt.gracePeriod" -}}
{{- /* drain, 5 s for the model to let go, and room to end */ -}}
{{- add .Values.preStopSeconds .Values.server.drainSeconds 15 -}}
{{- end -}}
