{{- define "canvasrt.serverContainer" -}}
{{- $server := .Values.server -}}
name: server
image: {{ include "canvasrt.serverImage" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - serve
  - {{ ternary .Values.model.path "/etc/canvasrt/pipeline.yaml" (eq .Values.pipeline.mode "none") | quote }}
  - "--host={{ $server.host }}"
  - --drain-seconds={{ $server.drainSeconds }}
  - --load-seconds={{ $server.loadSeconds }}
  - --canary-seconds={{ $server.canarySeconds }}
  - --answer-seconds={{ $server.answerSeconds }}
  {{- if $server.verbose }}
  - --verbose
  {{- end }}
  - --set=log_level={{ $server.logLevel }}
  {{- if and (eq .Values.pipeline.mode "none") (include "canvasrt.onGpu" .) }}
  - "--set=kernels=/tmp/{{ base .Values.model.path }}.kernels" # beside the model nothing can be written
  {{- end }}
  {{- range $key, $value := $server.settings }}
  - {{ printf "--set=%s=%v" $key $value | quote }}
  {{- end }}
{{- if or .Values.env (not (include "canvasrt.onGpu" .)) }}
env:
  {{- if not (include "canvasrt.onGpu" .) }}
  - name: NVIDIA_VISIBLE_DEVICES
    value: void
  {{- end }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
ports:
  - name: http
    containerPort: 8000
    protocol: TCP
  - name: grpc
    containerPort: 8001
    protocol: TCP
  - name: metrics
    containerPort: 8002
    protocol: TCP
{{- with .Values.startupProbe }}
{{- if .enabled }}
startupProbe:
  {{- include "canvasrt.canary" $ | nindent 2 }}
  periodSeconds: {{ .periodSeconds }}
  failureThreshold: {{ divf $server.loadSeconds .periodSeconds | ceil | int }}
{{- end }}
{{- end }}
{{- with .Values.readinessProbe }}
{{- if .enabled }}
readinessProbe:
  {{- include "canvasrt.canary" $ | nindent 2 }}
  periodSeconds: {{ .periodSeconds }}
  failureThreshold: {{ .failureThreshold }}
{{- end }}
{{- end }}
{{- with .Values.livenessProbe }}
{{- if .enabled }}
livenessProbe:
  {{- include "canvasrt.canary" $ | nindent 2 }}
  periodSeconds: {{ .periodSeconds }}
  # Three canary requests that fail, and a load of the model: until then the server is repairing itself.
  failureThreshold: {{ divf (add $server.loadSeconds (mul 4 $server.answerSeconds)) .periodSeconds | ceil | int }}
{{- end }}
{{- end }}
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .Values.preStopSeconds | quote }}]
resources:
  {{- include "canvasrt.resources" (dict "root" . "resources" .Values.resources "gpu" (include "canvasrt.onGpu" .)) | nindent 2 }}
securityContext:
  {{- include "canvasrt.containerSecurityContext" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  {{- include "canvasrt.modelMounts" . | nindent 2 }}
{{- end -}}

{{- /* The model's volume read-only, but for the kernels that TensorRT-RTX compiles on this GPU. `prepare` makes that folder:
       the kubelet would make it root's. */ -}}
{{- define "canvasrt.modelMounts" -}}
{{- if ne .Values.pipeline.mode "none" -}}
- name: pipeline
  mountPath: /etc/canvasrt
  readOnly: true
{{ end -}}
- name: models
  mountPath: /models
  readOnly: true
{{- if and (include "canvasrt.onGpu" .) (ne .Values.pipeline.mode "none") }}
- name: models
  mountPath: /models/kernels
  subPath: kernels
{{- end }}
- name: shm
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Makes nothing: waits for what the Job makes. */ -}}
{{- define "canvasrt.waitContainer" -}}
name: wait
image: {{ include "canvasrt.serverImage" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [prepare, /etc/canvasrt/pipeline.yaml, --wait, --timeout={{ .Values.pipeline.waitSeconds }}]
env:
  - name: NVIDIA_VISIBLE_DEVICES
    value: void
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  requests:
    cpu: "1"
    memory: 1Gi
  limits:
    memory: 4Gi
securityContext:
  {{- include "canvasrt.containerSecurityContext" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: pipeline
    mountPath: /etc/canvasrt
    readOnly: true
  - name: models
    mountPath: /models
    readOnly: true
  - name: shm
    mountPath: /dev/shm
  - name: tmp
    mountPath: /tmp
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
