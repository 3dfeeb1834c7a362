{{- /* What `canvasrt prepare` and `canvasrt serve` read. */ -}}
{{- define "canvasrt.pipelineFile" -}}
{{- $model := .Values.model -}}
volume: /models
profile: {{ default .Values.profile.name .Values.profile.file }}
{{- if $model.source }}
checkpoint:
  source: {{ $model.source | quote }}
{{- end }}
{{- with $model.quantize }}
{{- if .recipe }}
quantize:
  recipe: {{ .recipe }}
  device: {{ .device }}
{{- end }}
{{- end }}
{{- if include "canvasrt.onGpu" . }}
bundle:
  name: {{ include "canvasrt.bundleName" . }}
  {{- with $model.bundleSource }}
  source: {{ . | quote }}
  {{- end }}
  weights: {{ $model.weights }}
  {{- range $key := list "context" "slots" "canvases" "chunk" }}
  {{- with get $model $key }}
  {{ $key }}: {{ int . }}
  {{- end }}
  {{- end }}
kernels: /models/kernels
{{- end }}
{{- with $model.s3 }}
{{- if or .endpoint .region }}
s3:
  {{- with .endpoint }}
  endpoint: {{ . | quote }}
  {{- end }}
  {{- with .region }}
  region: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}
{{- if $model.oci.insecure }}
oci:
  insecure: true
{{- end }}
verify: {{ .Values.pipeline.verify }}
{{- with .Values.pipeline.keepBundles }}
keep: {{ int . }}
{{- end }}
{{- end -}}

{{- /* Another name for whatever gives another bundle: an upgrade builds beside the one that serves, a rollback finds it. */ -}}
{{- define "canvasrt.bundleName" -}}
{{- $model := .Values.model -}}
{{- $profile := pick .Values.profile "name" "file" "compiler" "computeCapability" -}}
{{- $of := list .Chart.AppVersion $profile $model.source $model.quantize.recipe $model.bundleSource $model.weights $model.context $model.slots $model.canvases $model.chunk -}}
{{- printf "%s-%s" .Values.profile.name (toJson $of | sha256sum | trunc 10) -}}
{{- end -}}

{{- define "canvasrt.modelVolume" -}}
name: models
{{- if .Values.hostPath.enabled }}
hostPath:
  path: {{ .Values.hostPath.path }}
  type: DirectoryOrCreate
{{- else if .Values.persistence.enabled }}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-models" (include "canvasrt.fullname" .)) .Values.persistence.existingClaim }}
{{- else }}
emptyDir:
  sizeLimit: {{ .Values.emptyDir.sizeLimit | quote }}
{{- end }}
{{- end -}}

{{- /* Where the volume of each replica comes from a template of the StatefulSet. */ -}}
{{- define "canvasrt.claimsPerReplica" -}}
{{- if and .Values.statefulSet.enabled .Values.persistence.enabled (not .Values.persistence.existingClaim) (not .Values.hostPath.enabled) -}}true{{- end -}}
{{- end -}}

{{- define "canvasrt.claimSpec" -}}
accessModes: [{{ .Values.persistence.accessMode }}]
{{- with .Values.persistence.storageClass }}
storageClassName: {{ ternary "" . (eq . "-") | quote }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.persistence.size | quote }}
{{- end -}}

{{- /* Tokens for the pipeline alone: the server gets none. A dict with root and gpu. */ -}}
{{- define "canvasrt.prepareEnv" -}}
{{- $model := .root.Values.model -}}
{{- $env := list -}}
{{- if not .gpu -}}
{{- /* The image asks for all GPUs, and this container has asked Kubernetes for none. */ -}}
{{- $env = append $env (dict "name" "NVIDIA_VISIBLE_DEVICES" "value" "void") -}}
{{- end -}}
{{- $secrets := list
      (list "HF_TOKEN" $model.token.existingSecret $model.token.key false)
      (list "AWS_ACCESS_KEY_ID" $model.s3.existingSecret "AWS_ACCESS_KEY_ID" false)
      (list "AWS_SECRET_ACCESS_KEY" $model.s3.existingSecret "AWS_SECRET_ACCESS_KEY" false)
      (list "AWS_SESSION_TOKEN" $model.s3.existingSecret "AWS_SESSION_TOKEN" true)
      (list "OCI_USERNAME" $model.oci.existingSecret "username" false)
      (list "OCI_PASSWORD" $model.oci.existingSecret "password" false) -}}
{{- range $secrets -}}
{{- if index . 1 -}}
{{- $from := dict "name" (index . 1) "key" (index . 2) -}}
{{- if index . 3 -}}{{- $_ := set $from "optional" true -}}{{- end -}}
{{- $env = append $env (dict "name" (index . 0) "valueFrom" (dict "secretKeyRef" $from)) -}}
{{- end -}}
{{- end -}}
{{- toYaml (concat $env .root.Values.env) -}}
{{- end -}}

{{- /* The container that makes what is missing; a dict with root and gpu. */ -}}
{{- define "canvasrt.prepareContainer" -}}
{{- $root := .root -}}
name: prepare
image: {{ include "canvasrt.builderImage" $root }}
imagePullPolicy: {{ $root.Values.pipeline.image.pullPolicy }}
args: [prepare, /etc/canvasrt/pipeline.yaml]
{{- with include "canvasrt.prepareEnv" . | fromYamlArray }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- include "canvasrt.resources" (dict "root" $root "resources" $root.Values.pipeline.resources "gpu" .gpu) | nindent 2 }}
securityContext:
  {{- include "canvasrt.containerSecurityContext" $root | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: pipeline
    mountPath: /etc/canvasrt
    readOnly: true
  - name: models
    mountPath: /models
  - name: shm
    mountPath: /dev/shm
  - name: tmp
    mountPath: /tmp
  {{- with $root.Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "canvasrt.scratchVolumes" -}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.shm.sizeLimit | quote }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmp.sizeLimit | quote }}
{{- end -}}

{{- /* Pod fields that server, Job and test share. */ -}}
{{- define "canvasrt.podCommon" -}}
serviceAccountName: {{ include "canvasrt.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "canvasrt.podSecurityContext" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "canvasrt.jobPod" -}}
{{- $gpu := include "canvasrt.preparesOnGpu" . -}}
metadata:
  labels:
    app.kubernetes.io/name: {{ include "canvasrt.name" . }}
    app.kubernetes.io/instance: {{ .Release.Name }}
    app.kubernetes.io/component: pipeline
  {{- with .Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "canvasrt.podCommon" . | nindent 2 }}
  {{- with .Values.runtimeClassName }}
  {{- if $gpu }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- end }}
  restartPolicy: Never
  containers:
    - {{ include "canvasrt.prepareContainer" (dict "root" . "gpu" $gpu) | indent 6 | trim }}
  {{- if and $gpu .Values.gpu.dra.enabled }}
  resourceClaims:
    - name: gpu
      resourceClaimTemplateName: {{ include "canvasrt.fullname" . }}-gpu
  {{- end }}
  {{- with .Values.pipeline.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  affinity:
    nodeAffinity:
      {{- if $gpu }}
      {{- include "canvasrt.gpuNodeAffinity" . | nindent 6 }}
      {{- else }}
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions:
              - key: kubernetes.io/arch
                operator: In
                values:
                  {{- toYaml .Values.image.architectures | nindent 18 }}
      {{- end }}
  {{- with (ternary .Values.tolerations .Values.pipeline.tolerations (and (not .Values.pipeline.tolerations) (eq $gpu "true"))) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumes:
    - name: pipeline
      configMap:
        name: {{ include "canvasrt.fullname" . }}-pipeline
    - {{ include "canvasrt.modelVolume" . | indent 6 | trim }}
    {{- include "canvasrt.scratchVolumes" . | nindent 4 }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
