{{- /* What a schema can't say. All faults at once, each with the keys that it is about. */ -}}
{{- define "canvasrt.validate" -}}
{{- if not .Values.profile.name -}}
{{- fail "\n\nprofile.name is empty: say which GPU it is, with -f helm/canvasrt/profiles/NAME.yaml\n" -}}
{{- end -}}
{{- $faults := concat (include "canvasrt.profileFaults" . | fromJsonArray) (include "canvasrt.modelFaults" . | fromJsonArray) (include "canvasrt.gpuFaults" . | fromJsonArray) (include "canvasrt.volumeFaults" . | fromJsonArray) (include "canvasrt.replicaFaults" . | fromJsonArray) -}}
{{- if $faults -}}
{{- fail (printf "\n\n%s\n" (join "\n" $faults)) -}}
{{- end -}}
{{- end -}}

{{- define "canvasrt.profileFaults" -}}
{{- $faults := list -}}
{{- $profile := .Values.profile -}}
{{- $missing := list -}}
{{- range $profile.cpuArchitectures -}}
{{- if not (has . $.Values.image.architectures) -}}{{- $missing = append $missing . -}}{{- end -}}
{{- end -}}
{{- if and $profile.cpuArchitectures (eq (len $missing) (len $profile.cpuArchitectures)) -}}
{{- $faults = append $faults (printf "image.architectures is [%s], and machines with profile.name %s are %s: use an image that has it, and add it to image.architectures" (join ", " .Values.image.architectures) $profile.name (join " or " $profile.cpuArchitectures)) -}}
{{- end -}}
{{- if not $profile.compiler -}}
{{- $faults = append $faults "profile.compiler is empty: take all of profile from helm/canvasrt/profiles/NAME.yaml, or from canvasrt profiles --format helm" -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{- define "canvasrt.modelFaults" -}}
{{- $faults := list -}}
{{- $model := .Values.model -}}
{{- if eq .Values.pipeline.mode "none" -}}
{{- if not $model.path -}}
{{- $faults = append $faults "model.path is empty, and pipeline.mode none makes no model: name the folder of a bundle or checkpoint in the image or a volume" -}}
{{- end -}}
{{- else -}}
{{- if $model.path -}}
{{- $faults = append $faults (printf "model.path and pipeline.mode %s: a model that is there already needs no pipeline. Set pipeline.mode to none, or remove model.path" .Values.pipeline.mode) -}}
{{- end -}}
{{- if not (or $model.source $model.bundleSource) -}}
{{- $faults = append $faults "model.source is empty: name a checkpoint such as hf://google/diffusiongemma-26B-A4B-it, or a bundle in model.bundleSource" -}}
{{- end -}}
{{- if and $model.bundleSource (not (include "canvasrt.onGpu" .)) -}}
{{- $faults = append $faults "model.bundleSource and profile.compiler torch: torch serves checkpoints. Name one in model.source" -}}
{{- end -}}
{{- if and $model.bundleSource $model.quantize.recipe -}}
{{- $faults = append $faults "model.bundleSource and model.quantize.recipe: a bundle is quantized already. Remove one" -}}
{{- end -}}
{{- if and $model.bundleSource (eq $model.weights "stripped") (not $model.source) -}}
{{- $faults = append $faults "model.weights stripped with model.bundleSource needs model.source: the weights come from the checkpoint" -}}
{{- end -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{- define "canvasrt.gpuFaults" -}}
{{- $faults := list -}}
{{- $gpu := .Values.gpu -}}
{{- $used := list -}}
{{- if ne $gpu.resourceName "nvidia.com/gpu" -}}{{- $used = append $used "gpu.resourceName" -}}{{- end -}}
{{- if $gpu.mig -}}{{- $used = append $used "gpu.mig" -}}{{- end -}}
{{- if $gpu.dra.enabled -}}{{- $used = append $used "gpu.dra.enabled" -}}{{- end -}}
{{- if gt (len $used) 1 -}}
{{- $faults = append $faults (printf "%s: one GPU is asked for in one way. Keep one of them" (join " and " $used)) -}}
{{- end -}}
{{- range $section := list .Values.resources .Values.pipeline.resources -}}
{{- range $kind := list "limits" "requests" -}}
{{- range $name, $_ := default dict (get $section $kind) -}}
{{- if or (hasPrefix "nvidia.com/" $name) (eq $name $gpu.resourceName) -}}
{{- $faults = append $faults (printf "resources.%s.%s: the chart asks for the GPU itself, as gpu.resourceName, gpu.mig or gpu.dra say. Remove it" $kind $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $gpu.dra.enabled (include "canvasrt.onGpu" .) -}}
{{- if or (not (include "canvasrt.draVersion" .)) (semverCompare "<1.32.0-0" .Capabilities.KubeVersion.Version) -}}
{{- $faults = append $faults (printf "gpu.dra.enabled is true, and this cluster (Kubernetes %s) has no API resource.k8s.io/v1beta1 or newer: it came with 1.32. Use gpu.resourceName, or update (helm template: --kube-version 1.34 --api-versions resource.k8s.io/v1)" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- if and (include "canvasrt.onGpu" .) (eq $gpu.nodeSelection "product") (not .Values.profile.productNames) -}}
{{- $faults = append $faults "profile.productNames is empty, and gpu.nodeSelection is product: list the values of your nodes' label nvidia.com/gpu.product, or set gpu.nodeSelection to computeCapability" -}}
{{- end -}}
{{- if and (include "canvasrt.onGpu" .) (eq $gpu.nodeSelection "computeCapability") (not .Values.profile.computeCapability) -}}
{{- $faults = append $faults "profile.computeCapability is empty, and gpu.nodeSelection is computeCapability: name it, such as \"9.0\"" -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{- define "canvasrt.volumeFaults" -}}
{{- $faults := list -}}
{{- if and .Values.hostPath.enabled .Values.persistence.enabled -}}
{{- $faults = append $faults "hostPath.enabled and persistence.enabled: models lie in one place. Set one to false" -}}
{{- end -}}
{{- if and (eq .Values.pipeline.mode "job") (not .Values.persistence.enabled) -}}
{{- $faults = append $faults "pipeline.mode job needs persistence.enabled: a Job and the server's Pods share a volume. Set pipeline.mode to init for hostPath or an emptyDir" -}}
{{- end -}}
{{- if and (eq .Values.pipeline.mode "job") (include "canvasrt.claimsPerReplica" .) -}}
{{- $faults = append $faults "pipeline.mode job and statefulSet.enabled: a Job can't fill a volume of each replica. Set pipeline.mode to init, or name a shared volume in persistence.existingClaim" -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}

{{- define "canvasrt.replicaFaults" -}}
{{- $faults := list -}}
{{- if and (eq (int .Values.replicaCount) 0) (not .Values.autoscaling.enabled) .Values.podDisruptionBudget.enabled -}}
{{- $faults = append $faults "replicaCount is 0 and podDisruptionBudget.enabled is true: a budget for no Pods protects nothing. Set podDisruptionBudget.enabled to false, or replicaCount to 1 or more" -}}
{{- end -}}
{{- range $name := list "context" "slots" "canvases" -}}
{{- if and (hasKey $.Values.server.settings $name) (get $.Values.model $name) -}}
{{- $faults = append $faults (printf "server.settings.%s and model.%s: say it once, in model.%s" $name $name $name) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "model" "checkpoint" "kernels" "drain_seconds" "log_level" -}}
{{- if hasKey $.Values.server.settings $name -}}
{{- $faults = append $faults (printf "server.settings.%s is set by the chart: use %s" $name (get (dict "model" "model.path" "checkpoint" "model.source" "kernels" "model.weights" "drain_seconds" "server.drainSeconds" "log_level" "server.logLevel") $name)) -}}
{{- end -}}
{{- end -}}
{{- toJson $faults -}}
{{- end -}}
